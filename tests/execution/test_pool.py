"""Actors that outlive a stage: dead ones are replaced, waiting ones hold nobody up, and those that
cannot start say why.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray

from isic_ray.config.run import RunConfig
from isic_ray.errors import UserError
from isic_ray.execution.pool import ActorPool, RayWorkers
from isic_ray.execution.progress import Progress
from tests.small_run import SMALL

pytestmark = pytest.mark.usefixtures("local_ray")


@dataclass(frozen=True)
class Number:
    kind: ClassVar[str] = "count"

    value: int


class Counter:
    """Says who it is; dies at its first unit unless the file ``uri`` exists."""

    def __init__(self, config: RunConfig, uri: str) -> None:
        self.died = Path(uri)

    def run(self, unit: Number) -> dict[str, Any]:
        if not self.died.exists():
            self.died.touch()
            os._exit(1)
        return {"value": unit.value, "pid": os.getpid()}


def unfit(config: RunConfig, uri: str) -> Counter:
    raise UserError("this machine has other weights.")


def actors(cpus: float) -> RunConfig:
    execution = replace(SMALL.execution, max_actors=2, cpus_per_actor=cpus)
    return replace(SMALL, execution=execution)


@contextmanager
def pool(died: Path, cpus: float = 0.5) -> Iterator[ActorPool]:
    with closing(ActorPool(Counter, actors(cpus), str(died))) as found:
        yield found


def run(pool: ActorPool, count: int) -> list[dict[str, Any]]:
    units = [Number(value) for value in range(count)]
    return pool.run(units, [1] * count, Progress(io.StringIO()))


def test_an_actor_that_dies_is_started_again_and_repeats_its_unit(tmp_path: Path) -> None:
    with pool(tmp_path / "died") as found:
        first, second = run(found, 6), run(found, 6)
        assert [counts["value"] for counts in first + second] == [*range(6), *range(6)]
        assert (tmp_path / "died").exists()
        later = {counts["pid"] for counts in run(found, 20)}
        assert {counts["pid"] for counts in second} <= later


def test_an_actor_that_waits_for_its_cpus_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    cpus = ray.cluster_resources()["CPU"]
    with pool(tmp_path / "died", 0.6 * cpus) as found:  # room for one of the two
        assert len({counts["pid"] for counts in run(found, 5)}) == 1


def test_ray_data_passes_units_on_to_kept_actors(tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    with pool(tmp_path / "died") as found:
        workers = RayWorkers(Counter, actors(0.5), "", found)
        units = [Number(value) for value in range(7)]
        counts = workers.run(units, [1] * 7, Progress(io.StringIO()))
        assert sorted(each["value"] for each in counts) == list(range(7))
        workers.close()
        assert len(run(found, 3)) == 3  # a pool that was given is left alive


def test_what_keeps_actors_from_starting_is_said(tmp_path: Path) -> None:
    with (
        closing(ActorPool(unfit, actors(1.0), "")) as found,
        pytest.raises(Exception, match="this machine has other weights"),
    ):
        run(found, 3)
