"""One small finished run, and the model behind it, for tests that damage copies of it.

    pytest tests/faults -m "slow or not slow" --figures tests/results/faults.json

writes the table of faults survived: what the tests pass to ``figures``, into the file's other
entries.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isic_ray.models.base import ModelSpec
from isic_ray.models.registry import load_model, read_spec
from isic_ray.workflows import worker as shard_worker
from tests.faults.inline import Remembering, drive
from tests.faults.small import SMALL

HARDWARE = "2-core x86-64 VM (AMD EPYC), no GPU"


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Notes what one test survived; call it after the asserts."""

    def note(fault: str, found: dict[str, Any]) -> None:
        print(fault, found)
        if path := request.config.getoption("--figures"):
            known = (
                json.loads(Path(path).read_text())
                if Path(path).exists()
                else {"hardware": HARDWARE, "faults": {}}
            )
            known["faults"][fault] = found
            Path(path).write_text(json.dumps(known, indent=2) + "\n")

    return note


@pytest.fixture(scope="session")
def facts() -> ModelSpec:
    return read_spec(SMALL.model)


@pytest.fixture(scope="package")  # not longer: other tests load other models
def remembering() -> Iterator[Remembering]:
    """The embedded model, loaded once and remembering its answers, in place of every later load."""
    torch.set_num_threads(1)
    model = Remembering(load_model(SMALL.model))
    auditors = [
        Remembering(auditor) for auditor in shard_worker.load_auditors(SMALL.judge.auditors)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_worker, "load_generator_and_judge", lambda *_: (model, model))
        patch.setattr(shard_worker, "load_auditors", lambda _: auditors)
        yield model


@pytest.fixture(scope="package")
def finished(
    tmp_path_factory: pytest.TempPathFactory, facts: ModelSpec, remembering: Remembering
) -> Path:
    """Where the small run lies. Copy it before you damage it."""
    out = tmp_path_factory.mktemp("faults") / "run"
    drive(str(out), facts)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))
