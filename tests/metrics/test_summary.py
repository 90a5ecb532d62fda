"""Is a summary read as it was written, and are results of another version refused?"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from isic_ray.config.run import RunConfig
from isic_ray.errors import UserError
from isic_ray.metrics.results import RunResults, read_rounds
from isic_ray.metrics.summary import AUDIT, SELF, Quarantined, Round, Summary
from isic_ray.runs.run import Run, fingerprint
from tests.report.summaries import make_summary, of_round_zero


def through_json(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return found


def make_run(path: Path) -> Run:
    config = RunConfig()
    record = {"config": asdict(config), "fingerprint": fingerprint(config), "plan": {}}
    return Run.create_or_resume(str(path), {**record, "model_digest": "0"})


@pytest.mark.parametrize(
    "summary",
    [
        make_summary(),
        make_summary(
            status="degraded",
            alarm="they diverge",
            quarantined=Quarantined(3, 0.03, {"ValueError: x": 3}),
        ),
        of_round_zero(calibration={}),
    ],
)
def test_a_summary_is_read_as_it_was_written(summary: Summary) -> None:
    assert Summary.from_record(through_json(summary.to_record()), "here") == summary


def test_a_round_leaves_out_what_it_does_not_have() -> None:
    first, edited = make_summary().rounds[:2]
    assert not {"tried", "note", "strength", "test", "spent"} & first.to_record().keys()
    full = replace(edited, rank=0, rows=5, touched=7, note="so", spent={"re-judge": 1.5})
    record = through_json(full.to_record())
    assert {"tried", "note", "strength", "rank", "rows", "touched", "test"} <= record.keys()
    assert Round.from_record(record) == full
    assert set(record["benign"]) == {AUDIT, "flagged", "psnr"}
    assert set(record["unsafe"]) == {AUDIT, SELF}


def test_results_of_another_version_are_refused_and_rounds_still_read(tmp_path: Path) -> None:
    run, summary = make_run(tmp_path / "run"), make_summary()
    for each in summary.rounds:
        run.commit_round(each.round, each.to_record())
    run.write_summary({**summary.to_record(), "schema": 1})
    with pytest.raises(UserError, match=r"summary.json has results of version 1, but this"):
        RunResults.open(run.store.uri)
    assert read_rounds(Run.open(run.store.uri)) == {each.round: each for each in summary.rounds}


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="has not ended; give the same `isic run` command again"):
        RunResults.open(run.store.uri)
    run.write_summary(make_summary().to_record())
    results = RunResults.open(run.store.uri)
    assert (results.base, results.best) == ("c0", "c1")
    assert results.config == RunConfig()


def test_evidence_counts_for_the_codebook_that_it_was_measured_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.write_summary(make_summary().to_record())
    assert RunResults.open(run.store.uri).evidence is None
    for codebook, found in (("c1", True), ("another", False)):
        evidence = {"schema": 2, "codebook": codebook}
        run.store.put("evidence.json", json.dumps(evidence).encode())
        assert (RunResults.open(run.store.uri).evidence == evidence) is found
    older = {"schema": 1, "codebook": "c1"}
    run.store.put("evidence.json", json.dumps(older).encode())
    assert RunResults.open(run.store.uri).evidence == older
    run.store.put("evidence.json", b'{"schema": 3, "codebook": "c1"}')
    with pytest.raises(UserError, match=r"evidence.json has results of version 3, but this"):
        _ = RunResults.open(run.store.uri).evidence
