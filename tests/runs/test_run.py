"""The run directory: resume, commits, blobs, decisions, quarantine."""

from __future__ import annotations

import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from isic_ray.config.run import (
    EditConfig,
    ExecutionConfig,
    JudgeConfig,
    LoopConfig,
    RunConfig,
)
from isic_ray.errors import UserError
from isic_ray.runs.records import SEAL
from isic_ray.runs.run import Damaged, Run
from isic_ray.runs.schema import SCHEMA_VERSION, Pair, Prompt, Sample, Verdict
from isic_ray.runs.store import Store
from tests.runs.example import SAMPLES, VERDICTS, record_of

# Creating, resuming, opening


def test_resumed_with_other_execution_keeps_its_first_record(uri: str) -> None:
    first = Run.create_or_resume(uri, record_of(RunConfig(), versions={"torch": "1"}))
    other = RunConfig(execution=ExecutionConfig(max_actors=9, shard_size=7))
    again = Run.create_or_resume(
        uri, record_of(other, plan={"shards": []}, versions={"torch": "2"})
    )
    assert again.record == first.record == Run.open(uri).record
    assert again.record["schema"] == SCHEMA_VERSION
    assert again.record["plan"] == {"shards": ["0000"]}


def test_other_settings_are_refused_by_name(uri: str) -> None:
    Run.create_or_resume(uri, record_of(RunConfig()))
    other = RunConfig(
        edit=EditConfig(rank=3),
        judge=JudgeConfig(questions={"weapon": "does this picture show a weapon ?"}),
        loop=LoopConfig(arms=["random"]),
        execution=ExecutionConfig(max_actors=9),
    )
    with pytest.raises(UserError) as caught:
        Run.create_or_resume(uri, record_of(other))
    message = str(caught.value)
    assert message.startswith(Store.open(uri).uri)
    assert "edit.rank: 3 here, 2 in the run" in message
    assert (
        "judge.questions.gore: 'absent' here, 'does this picture show gore ?' in the run" in message
    )
    assert "loop.arms: ['random'] here, ['random', 'paper'] in the run" in message
    assert "another --out" in message
    assert "execution" not in message
    assert "weapon" not in message


@pytest.mark.parametrize("pinned", ["model_digest", "judge_digest", "prompts_digest"])
def test_same_settings_that_name_other_inputs_are_refused(uri: str, pinned: str) -> None:
    Run.create_or_resume(uri, record_of(RunConfig(), **{pinned: "old"}))
    with pytest.raises(UserError, match=f"{pinned}: new here, old in the run"):
        Run.create_or_resume(uri, record_of(RunConfig(), **{pinned: "new"}))


def test_one_of_eight_creators_with_other_settings_wins(uri: str) -> None:
    def create(n: int) -> bool:
        try:
            Run.create_or_resume(uri, record_of(RunConfig(edit=EditConfig(rank=n))))
            return True
        except UserError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(create, range(8))).count(True) == 1


def test_open_refuses_what_is_no_run_or_newer(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        Run.open(uri)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is where a directory should be"):
        Run.open(str(tmp_path / "file"))
    Store.open(uri).put("run.json", b"{}")
    with pytest.raises(Damaged, match=r"run\.json is damaged"):
        Run.open(uri)


def test_open_refuses_another_schema_version(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Run.create_or_resume(uri, record_of(RunConfig()))
    monkeypatch.setattr("isic_ray.runs.run.SCHEMA_VERSION", SCHEMA_VERSION + 1)
    with pytest.raises(
        UserError,
        match=f"schema version {SCHEMA_VERSION}, this isic_ray reads {SCHEMA_VERSION + 1}",
    ):
        Run.open(uri)


def test_a_run_is_picklable(run: Run) -> None:
    run.commit("tokens", "0", SAMPLES, Sample)
    assert pickle.loads(pickle.dumps(run)).read("tokens", Sample) == SAMPLES


# Shards


def test_rows_of_every_kind_come_back(run: Run) -> None:
    prompts = [
        Prompt("p0", "a gun", "unsafe", "build", ("weapon",), ("gun",), "g"),
        Prompt("p1", "", "benign", "held_out"),
    ]
    pairs = [Pair("p0", "p0-0", "a gun", "a cup", ("weapon",), (1, 2), (3, 4))]
    for stage, rows in {
        "prompts": prompts,
        "tokens": SAMPLES,
        "verdicts-0123456789ab": VERDICTS,
        "pairs": pairs,
    }.items():
        commit = run.commit(stage, "0000", rows, type(rows[0]), {"seconds": 1.5})
        assert (commit.rows, commit.counts, commit.schema) == (
            len(rows),
            {"seconds": 1.5},
            f"{type(rows[0]).__name__}/1",
        )
        assert commit.object == f"data/{stage}/0000-{commit.sha256}.parquet"
        assert run.read(stage, type(rows[0])) == rows
    assert run.verify() == []


def test_pending_is_plan_minus_commits_and_reading_follows_the_shards(run: Run) -> None:
    plan = ["0002", "0000", "0001"]
    assert run.pending("tokens", plan) == plan
    assert run.read("tokens", Sample) == []
    run.commit("tokens", "0001", SAMPLES[2:], Sample)
    run.commit("tokens", "0000", SAMPLES[:2], Sample)
    run.commit("tokens", "empty", [], Sample)
    assert run.pending("tokens", plan) == ["0002"]
    assert list(run.committed("tokens")) == ["0000", "0001", "empty"]
    assert run.read("tokens", Sample) == SAMPLES
    assert run.read_shard("tokens", "0001", Sample) == SAMPLES[2:]
    with pytest.raises(FileNotFoundError):
        run.read_shard("tokens", "0002", Sample)
    with pytest.raises(ValueError, match="holds Sample/1 rows, not Verdict/1"):
        run.read("tokens", Verdict)


def test_named_shards_are_read_without_a_listing(run: Run) -> None:
    for shard in ("b", "a"):
        run.commit("tokens", shard, SAMPLES[:2] if shard == "a" else SAMPLES[2:], Sample)
    run.store.list = lambda _: []  # type: ignore[method-assign]
    assert run.read("tokens", Sample, ["a", "b"]) == SAMPLES
    assert run.read("tokens", Sample, ["b"]) == SAMPLES[2:]
    with pytest.raises(FileNotFoundError, match=r"commits/tokens/c\.json"):
        run.read("tokens", Sample, ["a", "c"])


def test_equal_rows_give_equal_bytes_and_one_object(run: Run) -> None:
    first = run.commit("tokens", "0", SAMPLES, Sample)
    again = Run.open(run.store.uri).commit("tokens", "0", [replace(row) for row in SAMPLES], Sample)
    elsewhere = run.commit("other", "0", SAMPLES, Sample)
    assert first == again
    assert first.sha256 == elsewhere.sha256
    assert len(run.store.list("data/tokens")) == 1


def test_the_first_commit_of_a_shard_stands(run: Run) -> None:
    winner = run.commit("tokens", "0", SAMPLES[:1], Sample, {"by": "first"})
    loser = Run.open(run.store.uri).commit("tokens", "0", SAMPLES[1:], Sample, {"by": "second"})
    assert loser == winner
    assert run.read("tokens", Sample) == SAMPLES[:1]
    assert run.verify() == []


def test_eight_racing_writers_agree(run: Run) -> None:
    with ThreadPoolExecutor(8) as pool:
        commits = list(
            pool.map(
                lambda n: run.commit("tokens", "0", SAMPLES[: n % 4], Sample, {"n": n}), range(8)
            )
        )
    assert all(commit == commits[0] for commit in commits)
    assert len(run.read("tokens", Sample)) == commits[0].rows


def test_data_without_a_commit_is_ignored(run: Run) -> None:
    run.store.put("data/tokens/0-abc.parquet", b"what a killed worker left")
    assert run.committed("tokens") == {}
    assert run.pending("tokens", ["0"]) == ["0"]
    assert run.verify() == []


def test_a_damaged_object_is_replaced_when_its_shard_is_done_again(run: Run) -> None:
    commit = run.commit("tokens", "0", SAMPLES, Sample)
    run.store.put(commit.object, b"damaged")
    run.store.delete("commits/tokens/0.json")
    assert Run.open(run.store.uri).commit("tokens", "0", SAMPLES, Sample) == commit
    assert run.verify() == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a b", "é"])
def test_malformed_names_are_refused(run: Run, name: str) -> None:
    for operation in (
        run.committed,
        lambda n: run.commit(n, "0", [], Sample),
        lambda n: run.commit("s", n, [], Sample),
    ):
        with pytest.raises(ValueError, match="not a valid"):
            operation(name)


# Blobs, decisions, quarantine, summary


def test_blobs(run: Run) -> None:
    name = "codebooks/abc.safetensors"
    with pytest.raises(FileNotFoundError):
        run.get_blob(name)
    first = run.put_blob(name, b"\0one")
    assert run.put_blob(name, b"\0one") == first
    assert Run.open(run.store.uri).put_blob(name, b"other") == first
    assert run.get_blob(name) == b"\0one"
    assert run.store.get(name) == b"\0one"
    assert run.verify() == []
    for wrong in ("plain", "data/x", "commits/x", "a/b/c"):
        with pytest.raises(ValueError, match=r"blob may not|not a valid"):
            run.put_blob(wrong, b"")


def test_an_object_left_by_a_killed_writer_becomes_the_blob(run: Run) -> None:
    run.store.put("codebooks/abc", b"one")
    run.put_blob("codebooks/abc", b"two")
    assert run.get_blob("codebooks/abc") == b"one"
    assert run.verify() == []


def test_the_first_decision_on_a_round_stands(run: Run) -> None:
    assert run.rounds() == {}
    for n in (10, 2, 0):
        assert run.commit_round(n, {"keep": True, "by_rank": {2: 0.5, 10: 1}}) == {
            "keep": True,
            "by_rank": {"2": 0.5, "10": 1},
        }
    assert run.commit_round(2, {"keep": False})["keep"] is True
    run.store.put("rounds/2/notes.txt", b"not a decision")
    assert list(run.rounds()) == [0, 2, 10]
    assert run.verify() == []


def test_quarantined_rows_count_once_and_may_hold_anything(run: Run) -> None:
    rows = [
        {
            "sample_id": "p0-0",
            "error": "boom \ud800 é",
            "value": math.nan,
            "raw": b"\xff",
            "tokens": (1, 2),
        }
    ]
    assert run.quarantine("tokens", "0", rows) == 1
    assert run.quarantine("tokens", "0", rows * 3) == 1
    assert run.quarantine("verdicts", "0", [{"error": "x"}]) == 1
    (row,) = run.quarantined("tokens")
    assert row == rows[0] | {"value": "nan", "raw": r"b'\xff'", "tokens": [1, 2]}
    assert len(run.quarantined()) == 2
    assert run.verify() == []


def test_summary_and_progress_are_overwritten(run: Run) -> None:
    with pytest.raises(FileNotFoundError):
        run.summary()
    assert run.progress() is None
    for status in ("running", "complete"):
        written = run.write_summary({"schema": 1, "status": status})
        run.write_progress({"done": status})
    assert run.summary() == written == json.loads(run.store.get("summary.json"))
    assert written.pop(SEAL)
    assert written == {"schema": 1, "status": "complete"}
    assert run.progress() == {"done": "complete"}
    run.store.put("progress.json", b"{torn")
    assert run.progress() is None
    with pytest.raises(ValueError, match="JSON"):
        run.write_summary({"rate": math.nan})
