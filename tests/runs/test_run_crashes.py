"""Crashes, lost replies and transient answers at every operation.

There is at most one commit per shard, and resuming converges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from isic_ray.runs.filesystems import MemoryFiles
from isic_ray.runs.run import Run
from isic_ray.runs.schema import Verdict
from isic_ray.runs.store import Store

PLAN = ["0", "1", "2"]
RECORD = {"fingerprint": "f", "config": {}}


class Killed(BaseException):
    """The process dies: nothing in the library may catch it."""


class Faulty:
    """In-memory files on which operation number ``at`` (from 0) suffers ``fault``.

    Each process has its own, on a shared root.
    """

    parallel = 1
    faults = ("crash before", "crash after", "lost reply", "transient", "stale listing")

    def __init__(self, root: str, fault: str = "", at: int = -1) -> None:
        self.inner, self.fault, self.at, self.count = MemoryFiles(root), fault, at, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._operate(name, *arguments)

    def _operate(self, name: str, *arguments: Any) -> Any:
        fault = self.fault if self.count == self.at else ""
        self.count += 1
        if fault == "crash before":
            raise Killed
        if fault == "transient":
            raise OSError(16, "409 conflicting operation in progress")
        if fault == "stale listing" and name == "keys":
            return list(self.inner.keys(*arguments))[:-1]  # as if the last write were not yet seen
        try:
            return getattr(self.inner, name)(*arguments)
        finally:  # the fault hides the answer, also an answer that is an error
            if fault == "crash after":
                raise Killed
            if fault == "lost reply":
                raise ConnectionResetError("reset by peer")


def store_of(files: Faulty) -> Store:
    return Store("memory://faulty", files=files, sleep=lambda _: None)


def rows_of(shard: str, worker: int) -> list[Verdict]:
    return [
        Verdict(f"{shard}-{n}", f"worker {worker}", "self", ("weapon",), (n / 4,)) for n in range(3)
    ]


def whole_job(store: Store, worker: int) -> Run:
    """What a driver does, in small: every kind of write."""
    run = Run.create_or_resume(store, RECORD)
    for shard in run.pending("verdicts", PLAN):
        run.quarantine("verdicts", shard, [{"error": "x", "worker": worker}])
        run.commit("verdicts", shard, rows_of(shard, worker), Verdict, {"worker": worker})
    run.put_blob("codebooks/abc", b"codebook of %d" % worker)
    # as the loop does: what stands, not a listing
    rounds = [run.commit_round(1, {"keep": True, "worker": worker})]
    run.write_summary({"rounds": len(rounds)})
    return run


def snapshot(run: Run) -> dict[str, bytes]:
    return {
        key: run.store.get(key)
        for folder in ("commits", "rounds", "quarantine")
        for key in run.store.list(folder)
    }


def check_whole(run: Run) -> None:
    assert run.verify() == []
    assert run.pending("verdicts", PLAN) == []
    for shard, commit in run.committed("verdicts").items():
        assert run.read_shard("verdicts", shard, Verdict) == rows_of(shard, commit.counts["worker"])
    assert len(run.quarantined()) == len(PLAN)
    assert run.get_blob("codebooks/abc").startswith(b"codebook of ")
    assert list(run.rounds()) == [1]
    assert run.summary()["rounds"] == 1


@pytest.mark.parametrize("fault", Faulty.faults)
def test_one_fault_at_every_operation(fault: str) -> None:
    undisturbed = Faulty(f"/{uuid4().hex}")
    whole_job(store_of(undisturbed), 0)
    assert undisturbed.count > 20
    for at in range(undisturbed.count):
        root = f"/{uuid4().hex}"
        try:
            whole_job(store_of(Faulty(root, fault, at)), 1)
            assert not fault.startswith("crash")
        except Killed:
            assert fault.startswith("crash")
            before = (
                snapshot(Run.open(store_of(Faulty(root))))
                if Faulty(root).exists("run.json")
                else {}
            )
            whole_job(store_of(Faulty(root)), 2)
            after = snapshot(Run.open(store_of(Faulty(root))))
            assert before.items() <= after.items(), at
        check_whole(Run.open(store_of(Faulty(root))))


FAULTS = st.sampled_from(("", *Faulty.faults))
MOMENTS = st.integers(0, 12)  # which operation suffers


class Workers(RuleBasedStateMachine):
    """Workers that come, fail at any operation, and do each other's shards with other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.root = f"/{uuid4().hex}"
        self.seen: dict[str, bytes] = {}
        self.worker = 0

    def attempt(self, fault: str, at: int, job: Callable[[Store, int], Any]) -> None:
        self.worker += 1
        with contextlib.suppress(Killed):
            job(store_of(Faulty(self.root, fault, at)), self.worker)

    @rule(shard=st.sampled_from(PLAN), fault=FAULTS, at=MOMENTS)
    def commit(self, shard: str, fault: str, at: int) -> None:
        def job(store: Store, worker: int) -> None:
            run = Run.create_or_resume(store, RECORD)
            commit = run.commit(
                "verdicts", shard, rows_of(shard, worker), Verdict, {"worker": worker}
            )
            assert run.read_shard("verdicts", shard, Verdict) == rows_of(
                shard, commit.counts["worker"]
            )

        self.attempt(fault, at, job)

    @rule(fault=FAULTS, at=MOMENTS)
    def decide(self, fault: str, at: int) -> None:
        self.attempt(
            fault,
            at,
            lambda store, w: Run.create_or_resume(store, RECORD).commit_round(1, {"worker": w}),
        )

    @rule(fault=FAULTS, at=MOMENTS)
    def blob(self, fault: str, at: int) -> None:
        self.attempt(
            fault,
            at,
            lambda store, w: Run.create_or_resume(store, RECORD).put_blob(
                "codebooks/abc", b"%d" % w
            ),
        )

    @rule(fault=FAULTS, at=MOMENTS)
    def whole(self, fault: str, at: int) -> None:
        self.attempt(fault, at * 4, whole_job)

    @invariant()
    def commits_stand_and_resolve(self) -> None:
        if not Faulty(self.root).exists("run.json"):
            return
        run = Run.open(store_of(Faulty(self.root)))
        assert run.verify() == []
        now = snapshot(run)
        assert self.seen.items() <= now.items()
        self.seen = now
        assert all("tmp" not in key for key in now)

    def teardown(self) -> None:
        run = whole_job(store_of(Faulty(self.root)), 0)
        assert run.pending("verdicts", PLAN) == []
        assert run.verify() == []
        now = snapshot(run)
        assert self.seen.items() <= now.items()
        whole_job(store_of(Faulty(self.root)), 99)
        assert snapshot(run) == now


Workers.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=10,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_workers = Workers.TestCase
