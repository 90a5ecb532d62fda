"""Workers killed and nodes lost in the middle of each stage, on a Ray cluster of several nodes: the
same run.

Run with `pytest -m slow tests/faults/test_ray_faults.py`; minutes, since Ray starts each worker
again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from isic_ray.runs.run import Run
from isic_ray.workflows.loop import run_isic
from tests.faults.small import TRAINED, account, essence, tries_over

pytestmark = pytest.mark.slow
ACTORS = 2
CONFIG = replace(
    TRAINED, execution=replace(TRAINED.execution, min_actors=ACTORS, max_actors=ACTORS)
)
SAMPLER, TRAINER = "ray::MapWorker", "ray::RayTrainWorker"


class Machines:
    """A head without CPUs and two nodes with two each."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=2) for _ in range(2)]
        self.cluster.wait_for_nodes()

    def processes(self, title: str) -> list[psutil.Process]:
        """Workers of this cluster (others may run on this machine) by the start of their title."""
        return [found for node in self.nodes for found in self._on(node, title)]

    def _on(self, node: Any, title: str) -> list[psutil.Process]:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [
            child for child in raylet.children(recursive=True) if _title(child).startswith(title)
        ]

    def kill(self, title: str) -> bool:
        """SIGKILL to one such process; False when there is none."""
        found = self.processes(title)
        if found:
            found[0].kill()
        return bool(found)

    def lose(self, title: str) -> bool:
        """A node with such a process vanishes, and an empty one joins later."""
        for node in self.nodes:
            if self._on(node, title):
                self.nodes.remove(node)
                self.cluster.remove_node(node, allow_graceful=False)
                self.nodes.append(self.cluster.add_node(num_cpus=2))
                return True
        return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = Machines()
    ray.init(address=found.cluster.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.cluster.shutdown()


@pytest.fixture(scope="module")
def whole(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run_isic(CONFIG, str(out))
    return out


def disturb(out: Path, act: Callable[[str], bool], running: Future[Any]) -> list[str]:
    """Acts once in each stage while the run at ``out`` is under way; returns the stages in which
    it did.
    """

    def commits(stage: str) -> int:
        return len(list(out.glob(f"commits/{stage}/*.json")))

    def edited() -> int:
        """Commits of verdicts under an edited codebook: of all such stages but the one that
        began before round 0.
        """
        stages = sorted(
            out.glob("commits/verdicts-*"),
            key=lambda path: min(p.stat().st_mtime for p in path.iterdir()),
        )
        return sum(commits(stage.name) for stage in stages[1:])

    plan: list[tuple[str, Callable[[], bool], str]] = [
        ("draw", lambda: commits("tokens") >= 2, SAMPLER),
        ("train", lambda: commits("pairs") >= 2 and not commits("deltas"), TRAINER),
        ("judge", lambda: edited() >= 1, SAMPLER),
    ]
    done = []
    deadline = time.monotonic() + 1500
    for stage, begun, title in plan:
        while time.monotonic() < deadline and not running.done():
            if begun() and act(title):
                done.append(stage)
                break
            time.sleep(0.05)
    return done


@pytest.mark.parametrize("fault", ["kill", "lose"])
def test_a_fault_in_each_stage(
    machines: Machines, whole: Path, tmp_path: Path, fault: str, figures: Callable[..., None]
) -> None:
    out = tmp_path / "run"
    with ThreadPoolExecutor(1) as driver:  # the run, since only the main thread may start a node
        running = driver.submit(run_isic, CONFIG, str(out))
        acted = disturb(out, getattr(machines, fault), running)
        running.result()
    run = Run.open(str(out))
    assert acted == ["draw", "train", "judge"]
    assert essence(run) == essence(Run.open(str(whole)))
    assert run.verify() == []
    assert (
        tries_over(run) <= ACTORS * 2
    )  # at most one shard an actor, in each of the two stages that have actors
    name = {"kill": "SIGKILL of a worker", "lose": "loss of a Ray node"}[fault]
    figures(f"{name} in each stage", {"injected": len(acted), **account(run, Run.open(str(whole)))})
