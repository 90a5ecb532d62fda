"""Verification: every damaged or missing object of a run is named, with the fix."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest

from isic_ray.config.run import RunConfig
from isic_ray.runs.run import Damaged, Run
from isic_ray.runs.schema import Sample, Verdict
from tests.runs.example import SAMPLES, VERDICTS, record_of


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def filled(run: Run) -> Run:
    run.commit("tokens", "0", SAMPLES, Sample)
    run.commit("tokens", "1", [], Sample)
    run.put_blob("codebooks/abc", bytes(100))
    run.commit_round(1, {"keep": True})
    run.quarantine("tokens", "0", [{"error": "x"}])
    run.write_summary({"schema": 1})
    run.write_page("report/index.html", "<html>é</html>")
    assert run.verify() == []
    return run


def all_keys(run: Run) -> list[str]:
    folders = ("data", "commits", "codebooks", "rounds", "quarantine", "report")
    return [
        "run.json",
        "ended.json",
        "summary.json",
        *(key for folder in folders for key in run.store.list(folder)),
    ]


@pytest.mark.parametrize(
    "damage", [flip, lambda data: data[:-1], lambda data: b"", lambda data: data + b"\n\0", None]
)
def test_verify_names_every_damaged_object(
    run: Run, damage: Callable[[bytes], bytes] | None
) -> None:
    for key in all_keys(filled(run)):
        data = run.store.get(key)
        if damage:
            run.store.put(key, damage(data))
        else:
            run.store.delete(key)
        problems = run.verify()
        # it can be written again at any time
        lost_unseen = damage is None and key.startswith("report/")
        assert len(problems) == (0 if lost_unseen else 1), (key, problems)
        assert all(key in problem and problem.endswith(".") for problem in problems), (
            key,
            problems,
        )
        run.store.put(key, data)
    assert run.verify() == []


def test_every_flipped_bit_of_a_record_and_an_object_is_seen() -> None:
    run = Run.create_or_resume(f"memory://{uuid4().hex}", record_of(RunConfig()))
    target = run.commit("tokens", "0", VERDICTS, Verdict).object
    run.write_page("report/index.html", "<html></html>")
    run.write_summary({"schema": 1, "rates": [0.5, 1, None, "text"]})
    for key in ("commits/tokens/0.json", target, "report/index.html", "summary.json", "ended.json"):
        data = run.store.get(key)
        for bit in range(0, len(data) * 8, 97):
            torn = bytearray(data)
            torn[bit // 8] ^= 1 << bit % 8
            run.store.put(key, bytes(torn))
            assert [problem for problem in run.verify() if key in problem], (key, bit)
        run.store.put(key, data)


def test_readers_refuse_damaged_and_missing_objects_with_the_fix(run: Run) -> None:
    commit = filled(run).committed("tokens")["0"]
    data = run.store.get(commit.object)
    fix = r"remove it and commits/tokens/0\.json, then run the same command again\."
    run.store.put(commit.object, flip(data))
    with pytest.raises(Damaged, match=f"is damaged .*{fix}"):
        run.read("tokens", Sample)
    run.store.put(commit.object, data[:-1])
    with pytest.raises(Damaged, match=f"bytes, its commit says {len(data)}; {fix}"):
        run.read_shard("tokens", "0", Sample)
    run.store.delete(commit.object)
    with pytest.raises(Damaged, match=f"was committed but is missing; {fix}"):
        run.read("tokens", Sample)
    run.store.put("codebooks/abc", bytes(99) + b"\1")
    with pytest.raises(Damaged, match="codebooks/abc is damaged"):
        run.get_blob("codebooks/abc")


def test_a_commit_under_another_shards_name_is_seen(run: Run) -> None:
    filled(run)
    run.store.put("commits/tokens/2.json", run.store.get("commits/tokens/0.json"))
    assert run.verify() == [
        f"{run.store.uri}/commits/tokens/2.json is not the commit of this shard; remove it and run "
        "again."
    ]
