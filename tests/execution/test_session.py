"""What is set for a Ray of one's own is not set for a cluster that others may take machines
from.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from isic_ray.execution.session import ray_session
from tests.small_run import SMALL

pytestmark = pytest.mark.usefixtures("local_ray")

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


def test_preemption_is_watched_for_within_a_job_and_not_on_a_ray_of_ones_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(WATCHER, "")
    monkeypatch.delenv(WATCHER)
    with monkeypatch.context() as job:
        job.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        with ray_session(SMALL.execution):
            assert WATCHER not in os.environ
    with ray_session(SMALL.execution):
        assert os.environ[WATCHER] == "0"


CODE = """
import logging, os, signal, warnings
from isic_ray.config.run import ExecutionConfig
from isic_ray.execution.session import ray_session

def state():
    names = ("ray", "ray.data", "ray.train", "DeepSpeed")
    loggers = [logging.getLogger(name).level for name in names]
    return dict(os.environ), list(warnings.filters), signal.getsignal(signal.SIGTERM), loggers

import ray.data, ray.train
before = state()
with ray_session(ExecutionConfig(address="local")):
    assert ray.is_initialized()
    assert state() != before
assert not ray.is_initialized()
for old, new in zip(before, state()):
    assert old == new, (old, new)
"""


def test_a_session_leaves_the_process_as_it_found_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
