"""One local Ray for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from isic_ray.execution.session import ray_session
from tests.small_run import SMALL


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """One local Ray for all tests of this folder that use it: starting it is most of their cost."""
    with ray_session(SMALL.execution):
        yield
    assert not ray.is_initialized()
