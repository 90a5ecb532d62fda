"""Does `isic doctor` pass sound checkpoints, and say in one sentence what is wrong with others?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Emu3ForConditionalGeneration

from isic_ray.cli.main import main
from tests.tiny_checkpoints import emu3, llamagen_published

TABLE = "vqmodel.quantize.embedding.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Emu3 in two shards with an index, as large checkpoints are published."""
    directory = emu3(tmp_path_factory.mktemp("sound"))
    model = Emu3ForConditionalGeneration.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="900KB")
    assert len(list(directory.glob("model-*.safetensors"))) >= 2
    return directory


def shard_with(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the shard that holds the codebook."""
    file = shard_with(directory, TABLE)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(directory: Path) -> None:
    file = shard_with(directory, TABLE)
    file.write_bytes(file.read_bytes()[:-100])


def lose_shard(directory: Path) -> None:
    shard_with(directory, TABLE).unlink()


def lose_table(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = directory / content["weight_map"].pop(TABLE)
    index.write_text(json.dumps(content))
    tensors = load_file(file)
    del tensors[TABLE]
    save_file(tensors, file, {"format": "pt"})


def lose_processor(directory: Path) -> None:
    for file in directory.glob("*token*"):
        file.unlink()


def rename_word(directory: Path, old: str, new: str) -> None:
    for name in ("tokenizer.json", "config.json"):
        file = directory / name
        file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "torn config": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "unknown family": (
        lambda d: change_config(d, model_type="llama"),
        "is of family 'llama'; known families",
    ),
    "missing shard": (lose_shard, "has no model-0"),
    "truncated shard": (truncate, "is cut short"),
    "index that lies": (
        lambda d: change_tensors(d, lambda t: t.pop(TABLE)),
        f"holds {TABLE}, but it does not",
    ),
    "no table": (lose_table, "so there is no codebook to edit"),
    "flat table": (
        lambda d: change_tensors(d, lambda t: t.update({TABLE: t[TABLE].flatten()})),
        "must be [rows, width]",
    ),
    "other shape": (
        lambda d: change_tensors(d, lambda t: t.update({TABLE: t[TABLE][:-1].clone()})),
        "has shape [63, 4], but",
    ),
    "wrong dtype": (
        lambda d: change_tensors(d, lambda t: t.update({TABLE: t[TABLE].to(torch.int8)})),
        "is I8; it must",
    ),
    "not finite": (
        lambda d: change_tensors(d, lambda t: t[TABLE][0].fill_(torch.nan)),
        "not finite",
    ),
    "missing processor": (lose_processor, "has no usable Emu3Processor"),
    "no yes": (lambda d: rename_word(d, "yes", "jawohl"), "no single token for 'yes'"),
    "vocabulary too small": (
        lambda d: rename_word(d, "<|visual token 000063|>", "<|extra_1|>"),
        "names 63 visual tokens, but the codebook has 64 rows",
    ),
    "no end of row": (
        lambda d: rename_word(d, "<|extra_200|>", "<|extra_2|>"),
        "lacks <|extra_200|>",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_it_names_the_problem_in_one_sentence(
    how: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BROKEN[how]
    directory = tmp_path / "broken"
    shutil.copytree(sound, directory)
    damage(directory)
    assert main(["doctor", "--model", str(directory), "--set", "model.device=cpu"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("isic: ")
    assert said.count("\n") == 1


def test_a_sound_checkpoint_passes(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(sound), "--set", "model.device=cpu"]) == 0
    said = capsys.readouterr().out
    for what in (
        "family    emu3",
        "codebook  [64, 4]",
        "16 tokens a picture",
        "32 x 32",
        "judge     P(yes)",
    ):
        assert what in said, said


def test_files_alone_can_be_looked_at(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["doctor", "--model", str(sound), "--files-only", "--set", "model.dtype=bfloat16"]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "in bfloat16" in said
    assert "loads" not in said


def test_models_lists_every_family_and_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    for word in (
        "janus",
        "emu3",
        "chameleon",
        "llamagen",
        "judge.model",
        "omnimamba",
        "mamba_ssm",
        "infinity",
    ):
        assert word in said


def test_convert_makes_what_the_doctor_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published, to = llamagen_published(tmp_path / "published"), tmp_path / "llamagen"
    convert = [
        "convert",
        str(published / "t2i.pt"),
        "--vq",
        str(published / "vq.pt"),
        "--to",
        str(to),
    ]
    assert main(convert) == 2
    assert "--vq and --text-encoder" in capsys.readouterr().err
    assert (
        main(
            [
                *convert,
                "--text-encoder",
                str(published / "t5"),
                "--heads",
                "4",
                "--image-size",
                "64",
            ]
        )
        == 0
    )
    assert main(["doctor", "--model", str(to), "--set", "model.device=cpu"]) == 0
    assert "needs judge.model" in capsys.readouterr().out
    assert (
        main(["convert", str(published / "vq.pt"), "--to", str(tmp_path / "vq.safetensors")]) == 0
    )
    assert "quantize.embedding.weight" in load_file(tmp_path / "vq.safetensors")
