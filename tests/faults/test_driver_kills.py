"""SIGKILL at every moment of every storage operation of a run: the same command again gives the
same run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def kill_at(out: Path, first: int, step: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.faults.killing", str(out), str(first), str(step)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=3600, cwd=Path(__file__).parents[2]
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def check(found: dict[str, Any], points: int) -> None:
    assert found["wrong"] == []
    assert found["killed"] == points
    assert found["moments"] > 300
    assert (found["lost"], found["duplicated"]) == (0, 0)


def test_killed_at_moments_spread_over_the_run(
    tmp_path: Path, figures: Callable[..., None]
) -> None:
    found = kill_at(tmp_path, 3, 19)
    check(found, len(range(3, found["moments"], 19)))
    assert found["shards_done_over"] > 0
    figures("SIGKILL at every 19th moment of storage operations", found)


@pytest.mark.slow
def test_killed_at_every_moment(tmp_path: Path, figures: Callable[..., None]) -> None:
    found = kill_at(tmp_path, 0, 1)
    check(found, found["moments"])
    figures("SIGKILL at every moment of storage operations", found)
