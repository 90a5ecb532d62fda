"""Actors that outlive a stage: dead ones are replaced, waiting ones hold nobody up, those that
cannot start say why.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray

from isic_ray.errors import UserError
from isic_ray.execution.pool import ActorPool

pytestmark = pytest.mark.usefixtures("local_ray")


class Member:
    """Says who it is; dies at its first batch if told so."""

    def __init__(self, fatal: Path) -> None:
        self.fatal = fatal

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not self.fatal.exists():
            self.fatal.touch()
            os._exit(1)
        return {"unit": batch["unit"], "pid": [os.getpid()] * len(batch["unit"])}


class Unfit:
    def __init__(self) -> None:
        raise UserError("this machine has other weights.")


def batches(count: int) -> list[dict[str, Any]]:
    return [{"unit": [number]} for number in range(count)]


def test_a_member_that_dies_is_started_anew_and_does_its_batch_again(tmp_path: Path) -> None:
    crew = ActorPool(Member, 2, (tmp_path / "died",), num_cpus=0.5)
    first, second = crew.map(batches(6)), crew.map(batches(6))
    assert [answer["unit"][0] for answer in first + second] == [*range(6), *range(6)]
    assert (tmp_path / "died").exists()
    assert {answer["pid"][0] for answer in second} <= {
        answer["pid"][0] for answer in crew.map(batches(20))
    }
    crew.close()


def test_a_member_that_waits_for_its_cpus_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    cpus = ray.cluster_resources()["CPU"]
    crew = ActorPool(
        Member, 2, (tmp_path / "died",), num_cpus=0.6 * cpus
    )  # room for one of the two
    assert len({answer["pid"][0] for answer in crew.map(batches(5))}) == 1
    crew.close()


def test_units_of_a_batch_are_shared_out(tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    crew = ActorPool(Member, 2, (tmp_path / "died",), num_cpus=0.5)
    answer = crew.hand_over({"unit": [4, 5, 6, 7]})
    assert answer["unit"] == [4, 5, 6, 7]
    assert len(answer["pid"]) == 4
    crew.close()


def test_what_keeps_members_from_starting_is_said() -> None:
    crew = ActorPool(Unfit, 2, ())
    with pytest.raises(Exception, match="this machine has other weights"):
        crew.map(batches(3))
    crew.close()
