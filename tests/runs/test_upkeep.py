"""`isic gc` deletes only what killed workers left; `isic status` says how far a run is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from isic_ray.cli.main import main
from isic_ray.config.run import RunConfig
from isic_ray.errors import UserError
from isic_ray.runs.garbage import collect, find_garbage
from isic_ray.runs.run import Run
from isic_ray.runs.schema import Pair, Prompt, Sample
from isic_ray.runs.shards import PAIRS, PROMPTS, TOKENS
from isic_ray.runs.status import RoundStatus, read_status
from tests.runs.example import SAMPLES, record_of

PROMPT_ROWS = [Prompt(f"p{n}", f"text {n}", "unsafe", "build") for n in range(5)]
DAY = 24 * 3600.0


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create_or_resume(
        str(tmp_path), record_of(RunConfig(), plan={"shard_size": 2, "prompts": 5})
    )
    run.commit(PROMPTS, "all", PROMPT_ROWS, Prompt)
    run.commit(TOKENS, "unsafe-build-0000", SAMPLES[:2], Sample, {"tries": 3})
    run.commit(PAIRS, "unsafe-build-0000", [], Pair)
    run.put_blob("codebooks/abc.safetensors", b"codebook")
    run.quarantine(
        TOKENS, "unsafe-build-0000", [{"sample_id": "x", "stage": TOKENS, "error": "boom"}]
    )
    run.commit_round(0, {"kept": True, "unsafe": {"self": {"rate": 0.75}}})
    return run


def litter(run: Run) -> set[str]:
    """What killed workers leave of each kind."""
    keys = {
        f"data/tokens/unsafe-build-0001-{'0' * 64}.parquet",
        f"data/tokens/unsafe-build-0000-{'0' * 64}.parquet",
        "codebooks/def.safetensors",
        "deltas/abc.safetensors",
        "attempts/tokens/unsafe-build-0000.json",
        f"probe-{'0' * 16}",
    }
    for key in keys:
        run.store.put(key, b"{}")
    left = Path(run.store.uri) / "data" / "tokens" / ".tmp-1-abc"
    left.write_bytes(b"torn")
    return keys | {"data/tokens/.tmp-1-abc"}


def age(run: Run, seconds: float) -> None:
    for path in Path(run.store.uri).rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_only_what_nothing_refers_to_is_garbage_and_only_when_old(run: Run) -> None:
    assert find_garbage(run, 0) == []
    others = [
        "attempts/tokens/unsafe-build-0001.json",
        "report/notes.txt",
        "notes.txt",
        "trials/a/run.json",
    ]
    for key in others:
        run.store.put(key, b"{}")
    keys = litter(run)
    assert find_garbage(run, DAY) == []
    age(run, 2 * DAY)
    assert {item.key for item in find_garbage(run, DAY)} == keys
    before = set(run.store.list(""))
    assert {item.key for item in collect(run, DAY)} == keys
    assert set(run.store.list("")) == before - keys
    assert find_garbage(run, 0) == []
    assert run.verify() == []
    assert run.read(TOKENS, Sample) == SAMPLES[:2]


def test_garbage_of_a_run_at_work_stays(run: Run) -> None:
    litter(run)
    age(run, 2 * DAY)
    run.write_progress({"stage": "x", "at": time.time() - 60})
    with pytest.raises(UserError, match="was at work 60 s ago; wait"):
        collect(run, DAY)
    run.write_progress({"stage": "x", "at": time.time() - 3600})
    assert len(collect(run, DAY)) == 7


def test_garbage_beside_a_damaged_commit_is_not_judged(run: Run) -> None:
    litter(run)
    run.store.put("commits/codebooks/abc.safetensors.json", b"{}")
    with pytest.raises(UserError, match="is damaged"):
        collect(run, 0)
    assert run.store.exists("codebooks/def.safetensors")


def test_an_old_object_without_commit_still_serves_a_later_try(run: Run) -> None:
    """gc between two tries loses nothing: the shard is stored again."""
    commit = run.committed(TOKENS)["unsafe-build-0000"]
    run.store.delete("commits/tokens/unsafe-build-0000.json")
    age(run, 2 * DAY)
    assert [item.key for item in collect(run, DAY)] == [commit.object]
    assert (
        Run.open(run.store).commit(TOKENS, "unsafe-build-0000", SAMPLES[:2], Sample).sha256
        == commit.sha256
    )
    assert Run.open(run.store).verify() == []


def test_status_of_a_run_at_work(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_status(run).state == "silent"
    driver = {"host": "node-1", "pid": 7, "running_s": 9.0}
    said = {
        "stage": "draw",
        "done": 2,
        "total": 5,
        "unit": "pictures",
        "stage_s": 3.0,
        "driver": driver,
    }
    run.write_progress({**said, "at": time.time() - 5})
    found = read_status(run)
    assert found.state == "running"
    assert found.shards == {TOKENS: (1, 3), PAIRS: (1, 3)}
    assert found.rounds[0] == RoundStatus(kept=True, unsafe_self=0.75, note="")
    assert (found.quarantined, found.tries_over) == (1, 2)
    assert main(["status", run.store.uri]) == 0
    shown = capsys.readouterr().out
    for text in (
        "running: draw, 2 of 5 pictures",
        "node-1, process 7",
        "1 of 3 shards",
        "75.0%",
        "2 shards",
    ):
        assert text in shown
    assert main(["status", run.store.uri, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["state"] == "running"
    assert printed["shards"] == {TOKENS: [1, 3], PAIRS: [1, 3]}
    assert printed["rounds"]["0"] == {"kept": True, "unsafe_self": 0.75, "note": ""}
    run.write_progress({**said, "at": time.time() - 3600})
    assert main(["status", run.store.uri]) == 0
    assert "the same command again goes on" in capsys.readouterr().out


def test_status_of_a_run_that_ended(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_progress({"stage": "draw", "at": time.time() - 5})
    run.write_summary({"schema": 1, "status": "degraded"})
    assert read_status(run).state == "ended"
    assert main(["status", run.store.uri]) == 0
    assert "ended, degraded" in capsys.readouterr().out


def test_gc_lists_and_deletes_only_when_asked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    litter(run)
    age(run, 2 * DAY)
    assert main(["gc", run.store.uri]) == 0
    assert "7 objects older than 24 h without use; --delete removes them" in capsys.readouterr().out
    assert run.store.exists("deltas/abc.safetensors")
    assert main(["gc", run.store.uri, "--grace-hours", "100", "--delete"]) == 0
    assert run.store.exists("deltas/abc.safetensors")
    assert main(["gc", run.store.uri, "--delete"]) == 0
    assert "7 objects older than 24 h deleted" in capsys.readouterr().out
    assert not run.store.exists("deltas/abc.safetensors")
