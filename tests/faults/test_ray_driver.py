"""The driver of a run on a real Ray killed by SIGKILL in the middle of each stage; and what a
secret leaves behind.

Run with `pytest -m slow tests/faults/test_ray_driver.py`; minutes, since every start is a new Ray.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isic_ray.config.describe import to_yaml
from isic_ray.runs.run import Run
from tests.faults.small import TRAINED, account, essence, tries_over
from tests.faults.test_secrets import CANARY, SECRETS

pytestmark = pytest.mark.slow
STAGES = ("draw", "train", "judge")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Ray's own files go here; its sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="if-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Driver:
    """`isic run` at ``out``, each time in a process and with a Ray of its own; every secret is
    the canary.
    """

    def __init__(self, out: Path, scratch: Path) -> None:
        self.out, self.scratch = out, scratch
        recipe = scratch / "recipe.yaml"
        recipe.write_text(to_yaml(TRAINED))
        self._command = [
            sys.executable,
            "-m",
            "isic_ray.cli.main",
            "run",
            "--config",
            str(recipe),
            "--out",
            str(out),
        ]

    def start(self) -> subprocess.Popen[bytes]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        secrets = dict.fromkeys(SECRETS, CANARY)
        environment = {**kept, **secrets, "RAY_TMPDIR": str(self.scratch / "ray")}
        with (self.scratch / "shown.log").open("ab") as log:
            return subprocess.Popen(self._command, env=environment, stdout=log, stderr=log)

    def kill_in(self, stage: str) -> None:
        """Runs until the stage is under way, and dies there."""
        driver = self.start()
        deadline = time.monotonic() + 300
        while not self._under_way(stage):
            assert driver.poll() is None, (self.scratch / "shown.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        driver.wait()

    def finish(self) -> None:
        assert self.start().wait(timeout=600) == 0, (self.scratch / "shown.log").read_text()

    def _under_way(self, stage: str) -> bool:
        if stage == "draw":
            return self._commits("tokens") >= 2
        if stage == "train":  # its order is given as soon as round 0 has ended
            return (self.out / "rounds" / "0.json").exists()
        return len(list(self.out.glob("commits/verdicts-*"))) > 1

    def _commits(self, stage: str) -> int:
        return len(list(self.out.glob(f"commits/{stage}/*.json")))


def test_the_driver_is_killed_in_each_stage(
    tmp_path: Path, scratch: Path, figures: Callable[..., None]
) -> None:
    Driver(tmp_path / "whole", scratch).finish()
    driver = Driver(tmp_path / "run", scratch)
    for stage in STAGES:
        driver.kill_in(stage)
    driver.finish()
    run, whole = Run.open(str(tmp_path / "run")), Run.open(str(tmp_path / "whole"))
    assert essence(run) == essence(whole)
    assert run.verify() == []
    assert tries_over(run) <= len(STAGES)
    figures("SIGKILL of the driver in each stage", {"injected": len(STAGES), **account(run, whole)})
    holding = [
        path
        for root in (tmp_path, scratch)
        for path in _files(root)
        if CANARY.encode() in path.read_bytes()
    ]
    assert len(_files(scratch / "ray")) > 20  # Ray's logs are among them
    assert holding == []


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
