"""One flipped bit, a cut or a loss, in each kind of object: `isic verify` names it, and readers
refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from isic_ray.cli.main import main
from isic_ray.cli.options import PROBLEM
from isic_ray.errors import UserError
from isic_ray.models.base import ModelSpec
from isic_ray.runs.run import Run
from isic_ray.runs.schema import Pair, Prompt, Sample, Verdict
from tests.faults.inline import Remembering, drive
from tests.faults.small import essence

KINDS = {  # kind of object: where the first of it lies
    "run": "run.json",
    "prompts": "data/prompts/*",
    "tokens": "data/tokens/*",
    "verdicts": "data/verdicts-*/*",
    "pairs": "data/pairs/*",
    "commit": "commits/tokens/*",
    "blob": "codebooks/*",
    "commit of a blob": "commits/codebooks/*",
    "round": "rounds/*",
    "quarantine": "quarantine/*/*",
    "ended": "ended.json",
    "summary": "summary.json",
    "report": "report/index.html",
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def read_all(run: Run) -> None:
    """What the loop, the report and `isic export` read."""
    run = Run.open(run.store)  # nothing remembered
    for stage, kind in (("prompts", Prompt), ("tokens", Sample), ("pairs", Pair)):
        run.read(stage, kind)
    for stage in run.stages():
        if stage.startswith("verdicts-"):
            run.read(stage, Verdict)
    for name in run.committed("codebooks"):
        run.get_blob(f"codebooks/{name}")
    run.rounds()
    run.quarantined()
    run.summary()


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_refused(
    copy: Path, kind: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.open(str(copy))
    run.quarantine(
        "tokens", "unsafe-build-0000", [{"sample_id": "x", "stage": "tokens", "error": "boom"}]
    )
    run.write_summary(run.summary())
    run.write_page("report/index.html", "<html></html>")
    assert main(["verify", str(copy)]) == 0
    path = min(copy.glob(KINDS[kind]))
    damage(path)
    capsys.readouterr()
    lost_page = (
        kind == "report" and damage is Path.unlink
    )  # can be written again at any time, so nothing is lost
    code = main(["verify", str(copy)])
    shown = capsys.readouterr()
    assert code == (0 if lost_page else 2 if kind == "run" and damage is Path.unlink else PROBLEM)
    assert lost_page or path.name in shown.out + shown.err
    assert "Traceback" not in shown.out + shown.err
    seen_by_verify_only = {"report", "ended"}
    if damage is Path.unlink:  # nothing points to these but ended.json
        seen_by_verify_only |= {"commit", "commit of a blob", "round", "quarantine"}
    if kind not in seen_by_verify_only:
        with pytest.raises((UserError, FileNotFoundError)):
            read_all(run)


@pytest.mark.parametrize("kind", ["tokens", "verdicts", "pairs", "blob"])
def test_a_damaged_object_is_mended_as_the_message_says(
    copy: Path, finished: Path, facts: ModelSpec, remembering: Remembering, kind: str
) -> None:
    """Remove it and its commit, give the same command again: nothing else is lost by it."""
    run = Run.open(str(copy))
    for path in sorted(copy.glob(KINDS[kind])):
        flip(path)
        (problem,) = run.verify()
        fix = re.search(
            r"remove it and (commits/\S+\.json), then run the same command again", problem
        )
        assert fix, problem
        path.unlink()
        (copy / fix[1]).unlink()
        drive(str(copy), facts)
        assert run.verify() == []
        assert essence(Run.open(str(copy))) == essence(Run.open(str(finished)))
