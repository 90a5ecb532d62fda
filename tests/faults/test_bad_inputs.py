"""Two hundred bad inputs: each gives one clear sentence and exit code 2, no traceback, and
nothing half-written.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import Tensor

from isic_ray.cli.main import main
from isic_ray.cli.options import USER_ERROR
from isic_ray.codebook import SafeCodebook
from isic_ray.config.describe import describe, to_yaml
from isic_ray.errors import UserError
from isic_ray.execution.pictures import _Decode
from isic_ray.models.base import ModelSpec
from isic_ray.runs.run import Run

BAD_VALUES = {
    "text": ["3", "[a]", "{a: b}", "null", "true"],
    "whole number": ["one", "1.5", "[1]", "null", "true", "'1'", "1e3", ".nan"],
    "number": ["many", "[0.1]", "null", "false", ".nan", "'0.5'", "{}"],
    "true or false": ["maybe", "1", "null", "'true'", "[true]"],
    "list of texts": ["word", "3", "{a: b}", "[1]", "[[a]]", "null"],
    "mapping of texts": ["word", "[a]", "{a: 1}", "{1: b}", "3", "null"],
}
OUT_OF_RANGE = [
    "sampling.guidance=0.5",
    "sampling.temperature=-1",
    "sampling.top_p=0",
    "sampling.top_k=-1",
    "judge.threshold=1.5",
    "prompts.held_out_share=-0.1",
    "prompts.samples_per_prompt=0",
    "edit.strength=2",
    "edit.rank=-1",
    "edit.method=magic",
    "edit.energy=0",
    "edit.smoothing=0",
    "finetune.steps=-1",
    "finetune.batch_size=0",
    "finetune.learning_rate=0",
    "finetune.zero_stage=4",
    "finetune.target=both",
    "finetune.benign_share=1",
    "loop.max_rounds=-1",
    "loop.significance=7",
    "loop.arms=[none,none]",
    "loop.arms=[magic]",
    "execution.shard_size=0",
    "execution.min_actors=0",
    "model.dtype=int8",
    "model.device=tpu",
    "edit.nothing=1",
    "nowhere.rank=1",
    "edit",
    "edit.rank",
    "edit.rank=",
    "=1",
    "judge.rewrite=none",
    "judge.questions={}",
    "execution.quarantine_share=2",
]


def bad_configs(randomness: random.Random) -> Iterator[bytes]:
    good = to_yaml()
    for setting in describe():
        section, key = setting.key.split(".")
        value = randomness.choice(BAD_VALUES[setting.type])
        yield f"{section}:\n  {key}: {value}\n".encode()
    yield from (
        b"",
        b"# nothing\n",
        b"- a\n- b\n",
        b"just words\n",
        b"model: 3\n",
        b"\xff\xfe\x00m",
        b"a: \x00\n",
        b"[",
    )
    yield from (
        b"model:\n\tname: x\n",
        b"model: {name: a, name: b}\n",
        b"model:\n  name: a\nmodel:\n  name: b\n",
    )
    yield from (
        b"? [a]\n: b\n",
        b"x: " + b"[" * 5000,
        b"model: &a [*a]\n",
        b"!!python/object:os.system {}\n",
    )
    yield good.replace("edit:", "edits:").encode()
    yield good.replace("rank:", "ranks:").encode()
    yield good.encode()[:-40] + b"\xff" + good.encode()[-40:]


def bad_prompts(randomness: random.Random) -> Iterator[tuple[str, bytes]]:
    row = json.dumps({"prompt": "a red knife"}).encode()
    for ending in ("txt", "xlsx", "json", "csv.gz", ""):
        yield ending, b"prompt\nx\n"
    for ending in ("csv", "jsonl", "parquet"):
        yield from (
            (ending, b""),
            (ending, b"\n\n"),
            (ending, b"\xff\xfe\x00\x01"),
            (ending, b"PAR1"),
        )
        yield ending, bytes(randomness.randrange(256) for _ in range(400))
    for body in (
        b"words\nx\n",
        b"prompt\n",
        b'prompt\n""\n',
        b"prompt\nx,y,z\n",
        b'prompt\n"open',
        b"prompt\n\0\n",
    ):
        yield "csv", body
    for body in (
        b"prompt,split\nx,middle\n",
        b"prompt,id\nx,1\ny,1\n",
        b"prompt,id\nx,\n",
        b"prompt\nonly one\n",
    ):
        yield "csv", body
    for body in (
        b"{",
        b"[1]",
        b"3",
        b'"x"',
        b"null",
        b'{"prompt": 3.5}',
        b'{"prompt": ["x"]}',
        b'{"text": null}',
    ):
        yield "jsonl", row + b"\n" + body + b"\n"
    yield from (
        ("jsonl", b'{"other": "x"}\n'),
        ("jsonl", b'{"prompt": "\\ud800"}\n'),
        ("jsonl", b"{" * 100_000),
    )
    yield "jsonl", row + b"\n" + b'{"prompt": "x", "concepts": [1]}\n'
    for table in (
        {"other": ["x"]},
        {"prompt": [1.5]},
        {"prompt": [[1]]},
        {"prompt": [None]},
        {"prompt": [b"x"]},
    ):
        buffer = io.BytesIO()
        pq.write_table(pa.table(table), buffer)
        yield "parquet", buffer.getvalue()
        yield "parquet", buffer.getvalue()[: randomness.randrange(8, buffer.tell() - 8)]


def bad_artifacts(good: bytes, randomness: random.Random) -> Iterator[bytes]:
    yield from (
        b"",
        b"x",
        b"\xff" * 100,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        good[:40],
    )
    yield struct.pack("<Q", 100_000) + b"[" * 100_000  # deep JSON within the cap of the header
    # a pickle
    yield b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94."
    for _ in range(24):
        torn = bytearray(good)
        torn[randomness.randrange(len(good) // 2, len(good))] ^= 1 << randomness.randrange(8)
        yield bytes(torn)


def bad_pictures() -> Iterator[object]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    good = buffer.getvalue()
    yield from (
        None,
        "text",
        3,
        b"",
        b"GIF89a",
        good[:40],
        good[:20] + b"\0" * 40,
        b"\xff\xd8\xff" + b"\0" * 99,
    )
    for side in (9_000, 60_000):  # some bytes that unfold to 81 and 3,600 megapixels
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        bomb = b"".join(
            _chunk(*part)
            for part in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b""))
        )
        yield b"\x89PNG\r\n\x1a\n" + bomb


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], None]:
    """Checks that a command fails in one sentence and leaves the folder as it was."""
    monkeypatch.chdir(tmp_path)

    def check(arguments: list[str]) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        shown = capsys.readouterr()
        lines = shown.err.strip().splitlines()
        assert code == USER_ERROR, (arguments, shown)
        assert len(lines) == 1, (arguments, shown.err)
        assert lines[0].startswith("isic: "), lines
        assert 25 < len(lines[0]) < 700, lines
        assert "Traceback" not in shown.out + shown.err
        assert sorted(tmp_path.rglob("*")) == before, arguments

    return check


SEEN: dict[str, int] = {}


def test_configurations(refused: Callable[[list[str]], None], tmp_path: Path) -> None:
    for number, content in enumerate(bad_configs(random.Random(1))):
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        refused(["run", "--config", str(path), "--out", "out"])
        SEEN["config"] = number + 1


def test_settings_on_the_command_line(refused: Callable[[list[str]], None]) -> None:
    for number, setting in enumerate(OUT_OF_RANGE):
        refused(["run", "--config", "demo", "--out", "out", "--set", setting])
        SEEN["setting"] = number + 1


def test_prompt_files(refused: Callable[[list[str]], None], tmp_path: Path) -> None:
    for number, (ending, content) in enumerate(bad_prompts(random.Random(2))):
        path = tmp_path / f"prompts.{ending}"
        path.write_bytes(content)
        refused(["run", "--config", "demo", "--out", "out", "--set", f"prompts.unsafe={path}"])
        path.unlink()
        SEEN["prompts"] = number + 1


def _use(path: Path, base: Tensor, edited: Tensor) -> None:
    """Where only the rows are wrong, that shows when they are put into a table, or taken out."""
    artifact = SafeCodebook.load(path)
    artifact.apply_to(base)
    artifact.revert_to(edited)


def test_artifacts(finished: Path, tmp_path: Path, facts: ModelSpec) -> None:
    run = Run.open(str(finished))
    good = run.get_blob(run.summary()["safe_codebook"])
    edited = SafeCodebook.from_bytes(good).apply_to(facts.codebook)
    for number, content in enumerate(bad_artifacts(good, random.Random(3))):
        path = tmp_path / "codebook.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^[^\n]{25,700}$"):
            _use(path, facts.codebook, edited)
        SEEN["artifact"] = number + 1


def test_run_folders(refused: Callable[[list[str]], None], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for content in (b"{}", b"[]", b"\xff", b'{"schema": 99}'):
        folder = tmp_path / f"bad-{zlib.crc32(content)}"
        folder.mkdir()
        (folder / "run.json").write_bytes(content)
    for number, where in enumerate(
        [
            "empty",
            "file",
            "nowhere",
            "s3://",
            "gs://x",
            "http://x",
            *map(str, tmp_path.glob("bad-*")),
        ]
    ):
        refused(["status", where])
        refused(["report", where])
        SEEN["run"] = 2 * number + 2


def test_pictures() -> None:
    for number, data in enumerate(bad_pictures()):
        assert _Decode(8)._picture(data) is None
        SEEN["picture"] = number + 1


def test_they_are_two_hundred() -> None:
    assert sum(SEEN.values()) >= 200, SEEN
