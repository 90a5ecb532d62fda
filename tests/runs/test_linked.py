"""A run whose data are another run's: what is shared, and what is its own."""

from __future__ import annotations

import pickle
from pathlib import Path

from isic_ray.runs.run import Run
from isic_ray.runs.schema import Verdict

ROWS = [Verdict("p0", "c", "self", ("weapon",), (0.5,))]


def test_commits_are_shared_and_decisions_are_not(tmp_path: Path) -> None:
    shared = Run.create_or_resume(str(tmp_path / "shared"), {"fingerprint": "s", "config": {}})
    shared.commit("verdicts", "0000", ROWS, Verdict)
    trials = [
        Run.create_or_resume(
            str(tmp_path / name),
            {"fingerprint": name, "config": {}, "shared": str(tmp_path / "shared")},
        )
        for name in ("one", "two")
    ]
    assert trials[0].read("verdicts", Verdict) == ROWS
    trials[0].commit("verdicts", "0001", ROWS, Verdict)
    trials[0].put_blob("codebooks/abc", b"bytes")
    trials[0].commit_round(1, {"kept": True})
    trials[0].write_summary({"schema": 1, "status": "complete"})

    assert list(trials[1].committed("verdicts")) == ["0000", "0001"]
    assert trials[1].get_blob("codebooks/abc") == b"bytes"
    assert trials[1].rounds() == {}
    assert shared.rounds() == {}
    assert not trials[1].store.exists("summary.json")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "ended.json",
        "rounds",
        "run.json",
        "summary.json",
    ]


def test_a_worker_opens_the_same_run_by_its_uri_or_by_pickle(tmp_path: Path) -> None:
    Run.create_or_resume(str(tmp_path / "shared"), {"fingerprint": "s", "config": {}}).put_blob(
        "codebooks/a", b"1"
    )
    record = {"fingerprint": "t", "config": {}, "shared": str(tmp_path / "shared")}
    trial = Run.create_or_resume(str(tmp_path / "trial"), record)
    for run in (Run.open(trial.store.uri), pickle.loads(pickle.dumps(trial))):
        assert run.get_blob("codebooks/a") == b"1"
        assert run.record["fingerprint"] == "t"
        assert run.verify() == []
