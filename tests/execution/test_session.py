"""What is set for a Ray of one's own is not set for a cluster that others may take machines
from.
"""

from __future__ import annotations

import os

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
