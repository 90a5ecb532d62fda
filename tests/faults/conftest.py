"""One small finished run, and the model behind it, for tests that damage copies of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isic_ray.execution import shard_worker
from isic_ray.models.base import ModelFacts
from isic_ray.models.registry import load_model, read_facts
from tests.faults.inline import Remembering, drive
from tests.faults.small import SMALL


@pytest.fixture(scope="session")
def facts() -> ModelFacts:
    return read_facts(SMALL.model)


@pytest.fixture(scope="session")
def remembering() -> Iterator[Remembering]:
    """The embedded model, loaded once and remembering its answers, in place of every later load."""
    torch.set_num_threads(1)
    model = Remembering(load_model(SMALL.model))
    auditors = [Remembering(auditor) for auditor in shard_worker.load_auditors(SMALL.judge.auditors)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_worker, "load_pair", lambda *_: model)
        patch.setattr(shard_worker, "load_auditors", lambda _: auditors)
        yield model


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, facts: ModelFacts, remembering: Remembering) -> Path:
    """Where the small run lies. Copy it before you damage it."""
    out = tmp_path_factory.mktemp("faults") / "run"
    drive(str(out), facts)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))
