"""Kill a whole run at a chosen moment of a chosen storage operation, then give the same command
again.

    python -m tests.faults.killing OUT FIRST STEP

runs the small run undisturbed, counts the moments of its storage operations (before each; for
writes also between the temporary file and its name, and after), and for moments FIRST, FIRST +
STEP, … forks a process that dies there by SIGKILL and one that resumes. Loop and worker share a
process here, without Ray, and what the model answered in the undisturbed run is remembered: what is
tested is the order of writes, for driver and worker alike, in a hundredth of the time. Prints one
JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isic_ray.execution import progress
from isic_ray.models.base import ModelSpec
from isic_ray.models.registry import load_model, read_spec
from isic_ray.runs import filesystems
from isic_ray.runs.run import Run
from isic_ray.workflows import worker as shard_worker
from tests.faults.inline import Remembering, drive
from tests.faults.small import SMALL, account, essence, tries_over

READS, WRITES = ("read", "exists", "keys"), ("create", "replace", "delete")


class Moments:
    """Counts moments, and dies at number ``at``."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.count = at, 0
        self.names: list[str] = []

    def pass_by(self, name: str) -> None:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        self.names.append(name)

    def install(self) -> None:
        """Into this process's local filesystems, for good."""
        for name in READS + WRITES:
            setattr(
                filesystems.LocalFiles,
                name,
                self._watched(name, getattr(filesystems.LocalFiles, name)),
            )
        for name in ("link", "replace"):
            setattr(os, name, self._between(name, getattr(os, name)))

    def _watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(files: Any, *arguments: Any) -> Any:
            self.pass_by(f"{name} {arguments[0]}")
            result = operation(files, *arguments)
            if name in WRITES:
                self.pass_by(f"{name} {arguments[0]}, done")
            return result

        return run

    def _between(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(source: str, target: str) -> None:
            self.pass_by(f"{name} to {target}")
            operation(source, target)

        return run


def forked(action: Callable[[], None]) -> int:
    """The exit code of a child that does it; -9 when it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def attempt(out: str, facts: ModelSpec, at: int) -> int:
    def action() -> None:
        moments = Moments(at)
        moments.install()
        drive(out, facts)
        Path(f"{out}.moments").write_text(json.dumps(moments.names))

    return forked(action)


def main(out: str, first: int, step: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    progress.WATCH_EVERY_S = (
        1e9  # at the start of each stage only, so that moments do not hang on the clock
    )
    facts = read_spec(SMALL.model)
    model = Remembering(load_model(SMALL.model))
    auditors = [
        Remembering(auditor) for auditor in shard_worker.load_auditors(SMALL.judge.auditors)
    ]
    shard_worker.load_generator_and_judge = lambda *_: (model, model)
    shard_worker.load_auditors = lambda _: auditors
    drive(f"{out}/first", facts)  # here, so that all children know its answers
    assert attempt(f"{out}/whole", facts, -1) == 0
    assert essence(Run.open(f"{out}/first")) == essence(Run.open(f"{out}/whole"))
    names = json.loads(Path(f"{out}/whole.moments").read_text())
    whole = essence(Run.open(f"{out}/whole"))
    wrong, killed, total = [], 0, Counter[str]()
    for at in range(first, len(names), step):
        place = f"{out}/{at}"
        killed += attempt(place, facts, at) == -signal.SIGKILL
        ended = attempt(place, facts, -1)
        run = Run.open(place)
        total.update(account(run, Run.open(f"{out}/whole")))
        if ended != 0 or run.verify() or essence(run) != whole or tries_over(run) > 1:
            wrong.append([at, names[at], ended, *run.verify()])
        shutil.rmtree(place)
    return {"moments": len(names), "killed": killed, "wrong": wrong, **total}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
