"""Retraining on generated pictures with real Ray Data, Train and DeepSpeed, from a run that the
loop wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isic_ray.codebook import SafeCodebook
from isic_ray.config.retrain import retrain_config
from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.execution.pictures import find_pictures, stream
from isic_ray.execution.retraining import HARMLESS
from isic_ray.models.registry import read_spec
from isic_ray.runs.run import Run
from isic_ray.workflows.retrain import retrain
from tests.cluster.pictures import write_pictures
from tests.cluster.worker_loss import one_worker_killed

pytestmark = pytest.mark.usefixtures("local_ray")

SMALL = [
    "steps=8",
    "batch_size=16",
    "micro_batch=8",
    "evaluate=24",
    "save_every=4",
    "shuffle=32",
    "learning_rate=0.02",
]
Finished = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("pictures"))
    write_pictures(folder, count=120, shard=30)
    return folder


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "shard"), [("parquet", 8), ("tar", 8), ("files", 1)])
def test_every_kind_of_folder_gives_the_same_pictures(
    tmp_path: Path, kind: str, shard: int
) -> None:
    write_pictures(str(tmp_path), count=16, shard=shard, kind=kind)
    found = find_pictures(str(tmp_path))
    batch = stream(found.kind, found.train + found.evaluate, size=48).take_batch(16)["picture"]
    assert batch.shape == (16, 48, 48, 3)
    assert batch.dtype == "uint8"
    assert len({picture.tobytes() for picture in batch}) > 8


def test_pictures_that_evaluate_come_in_the_order_of_their_files(tmp_path: Path) -> None:
    """However long each file takes to read: evaluations of several trainings are of the
    same pictures.
    """
    for name, count in (("long", 5000), ("short", 4)):
        write_pictures(str(tmp_path / name), count=count, shard=count)
    files = [str(tmp_path / name / "part-0000.parquet") for name in ("long", "short")]
    expected = stream("parquet", files[:1], size=48).take_batch(8)["picture"]
    found = stream("parquet", files, size=48).take_batch(8)["picture"]
    assert (found == expected).all()


def test_reconstruction_improves_outside_the_harmful_space(
    finished: Finished, pictures: str, tmp_path: Path
) -> None:
    out = tmp_path / "codebook"
    settings = [
        *SMALL,
        "workers=2",
    ]  # as many as the machine of the tests has CPUs, and the pictures are read too
    config = retrain_config(str(finished[0]), pictures, settings)
    result = retrain(config, str(out))
    rows = metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert result["after"]["evaluation_loss"] < result["before"]["evaluation_loss"]
    assert (
        max(row["harmful_component"] for row in rows)
        == result["largest_harmful_component"]
        < HARMLESS
    )
    assert list((out / "tensorboard").iterdir())
    artifact = SafeCodebook.from_bytes(Run.open(str(out)).get_blob(result["safe_codebook"]))
    artifact.apply_to(read_spec(ModelConfig()).codebook)

    before = (out / "metrics.jsonl").read_bytes()
    assert retrain(config, str(out)) == result  # the same command again: nothing is trained
    assert (out / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="learning_rate"):
        retrain(
            retrain_config(str(finished[0]), pictures, [*settings, "learning_rate=0.01"]), str(out)
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_killed_worker_is_replaced_and_training_goes_on(
    finished: Finished, pictures: str, tmp_path: Path, stage: int
) -> None:
    out = tmp_path / "codebook"
    settings = [*SMALL, "steps=60", "save_every=10", f"zero_stage={stage}", "workers=2"]
    with one_worker_killed(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2):
        result = retrain(retrain_config(str(finished[0]), pictures, settings), str(out))
    rows = metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
    assert result["after"]["evaluation_loss"] < result["before"]["evaluation_loss"]
    assert result["largest_harmful_component"] < HARMLESS


@pytest.mark.slow
def test_bfloat16_decoding_and_accumulation_train_too(
    finished: Finished, pictures: str, tmp_path: Path
) -> None:
    config = retrain_config(str(finished[0]), pictures, [*SMALL, "bf16=true", "micro_batch=4"])
    result = retrain(config, str(tmp_path / "codebook"))
    assert result["after"]["evaluation_loss"] < result["before"]["evaluation_loss"]
