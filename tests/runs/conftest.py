"""A run directory on a disk and in memory."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from isic_ray.config.run import RunConfig
from isic_ray.runs.run import Run
from tests.runs.example import record_of


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid4().hex}/run"


@pytest.fixture
def run(uri: str) -> Run:
    return Run.create_or_resume(uri, record_of(RunConfig()))
