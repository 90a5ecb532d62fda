"""Two drivers on one run: one set of commits, one result. Other settings on it: one sentence."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from isic_ray.config.run import SamplingConfig
from isic_ray.errors import UserError
from isic_ray.models.base import ModelSpec
from isic_ray.runs.run import Run
from tests.faults.inline import Remembering, drive
from tests.faults.small import SMALL, essence


def test_drivers_that_race_leave_one_run(
    tmp_path: Path, finished: Path, facts: ModelSpec, remembering: Remembering
) -> None:
    out = str(tmp_path / "run")
    children = []
    for _ in range(3):
        if (pid := os.fork()) == 0:
            try:
                drive(out, facts)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    run = Run.open(out)
    assert run.verify() == []
    assert essence(run) == essence(Run.open(str(finished)))
    for stage in run.stages():
        objects = run.store.list(f"data/{stage}")
        assert len(objects) in (0, len(run.committed(stage))), "a second copy of a shard"


def test_other_settings_on_the_same_run_are_refused(copy: Path, facts: ModelSpec) -> None:
    before = sorted(path.read_bytes() for path in copy.rglob("*") if path.is_file())
    with pytest.raises(UserError) as caught:
        drive(str(copy), facts, replace(SMALL, sampling=SamplingConfig(seed=7)))
    assert "sampling.seed: 7 here, 0 in the run" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.read_bytes() for path in copy.rglob("*") if path.is_file()) == before
