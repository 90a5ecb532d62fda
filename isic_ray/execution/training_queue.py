"""Groups of Ray Train workers that wait for deltas to train, so that only the first pays for a
group's start.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

from isic_ray.config.run import FinetuneConfig
from isic_ray.errors import UserError

_POLL_S = 0.1
_LITTLE = 1e6  # bytes
_MAX_FAILURES = 2  # worker groups that may be lost before the run fails

Place = tuple[int, int]  # a group, and the number of one of its orders, counted from 0


class TrainingQueue:
    """An actor between those who give orders and the groups of workers, each of which carries out
    its own in turn.

    An order counts as done only when its worker says so; a group that is started anew gets an
    unfinished one again.
    """

    def __init__(self, groups: int = 1) -> None:
        self._orders: list[list[Any]] = [[] for _ in range(groups)]
        self._outcomes: list[list[str]] = [[] for _ in range(groups)]
        self._closed = False

    def give(self, order: Any) -> Place:
        """Lays an order before the group with the least to do."""
        waiting = [
            len(orders) - len(done)
            for orders, done in zip(self._orders, self._outcomes, strict=True)
        ]
        group = waiting.index(min(waiting))
        self._orders[group].append(order)
        return group, len(self._orders[group]) - 1

    def order(self, group: int, number: int) -> Any:
        """An order; "wait" when it is not there yet, "end" when none will come."""
        if number < len(self._orders[group]):
            return self._orders[group][number]
        return "end" if self._closed else "wait"

    def finish(self, group: int, number: int, failure: str = "") -> None:
        """The group's order ``number`` is carried out, or cannot be: the ``failure`` in one
        sentence.
        """
        if number == len(self._outcomes[group]):
            self._outcomes[group].append(failure)
            self._orders[group][number] = None

    def outcome(self, group: int, number: int) -> str | None:
        """None while an order is open, "" when it is carried out, or why it cannot be."""
        done = self._outcomes[group]
        return done[number] if number < len(done) else None

    def done(self, group: int) -> int:
        """How many of its orders a group is through with."""
        return len(self._outcomes[group])

    def close(self) -> None:
        self._closed = True


def next_job(desk: Any, group: int, number: int) -> Any:
    """Called by a worker: an order of its group, waited for; None when none will come."""
    import ray

    while (order := ray.get(desk.order.remote(group, number))) == "wait":
        time.sleep(_POLL_S)
    return None if order == "end" else order


class TrainingGroups:
    """``count`` groups, each of ``finetune.workers``, which start with the first order or with
    `start`.

    When ``kept`` they live until `close`, else until the order is done. ``train_loop`` runs on
    every worker, with ``loop_config`` and, under "desk", "group" and "groups", the desk, its
    group's number and how many there are. Once started, copies in other processes may give orders
    too; the one that started them closes them.
    """

    def __init__(
        self,
        finetune: FinetuneConfig,
        kept: bool,
        train_loop: Any,
        loop_config: dict[str, Any],
        count: int = 1,
    ) -> None:
        self._finetune, self._kept, self._count = finetune, kept, count
        self._train_loop, self._loop_config = train_loop, loop_config
        self._desk: Any = None
        self._fits: list[Any] = []  # Ray Train's calls, which last as long as the workers

    def __enter__(self) -> TrainingGroups:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._desk = ray.remote(num_cpus=0)(TrainingQueue).remote(self._count)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        fit = ray.remote(num_cpus=0, scheduling_strategy=here)(_fit)
        places = [
            {"desk": self._desk, "group": group, "groups": self._count}
            for group in range(self._count)
        ]
        settings = (self._finetune, self._kept)
        self._fits = [
            fit.remote(self._train_loop, {**self._loop_config, **place}, *settings)
            for place in places
        ]

    def carry_out(self, order: dict[str, Any]) -> None:
        """Returns once the workers have; raises UserError for what cannot be, and what ended the
        workers early.
        """
        import ray

        if not self._fits:
            self.start()
        group, number = ray.get(self._desk.give.remote(order))
        while (failure := ray.get(self._desk.outcome.remote(group, number))) is None:
            if ray.wait([self._fits[group]], timeout=_POLL_S)[0]:
                ray.get(self._fits[group])
                raise RuntimeError("the training workers ended before their work was done")
        if not self._kept:
            self.close()
        if failure:
            raise UserError(failure)

    def close(self) -> None:
        """Lets the workers go, and does not wait for it.

        On a Ray without a dashboard, Ray Train ends up to 12 s after its workers: a helper of its
        own asks the dashboard whether the training lives.
        """
        if self._fits:
            self._desk.close.remote()
            self._fits = []


def _fit(
    train_loop: Any, loop_config: dict[str, Any], finetune: FinetuneConfig, kept: bool
) -> None:
    """A task: Ray Train, which blocks and handles Ctrl-C by itself, so it is not for a driver
    that does other work.
    """
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train_loop, train_loop_config=loop_config, **_trainer_settings(finetune, kept)
    ).fit()


def _trainer_settings(finetune: FinetuneConfig, kept: bool) -> dict[str, Any]:
    """Ray Train's settings. Workers that are kept ask for no CPU: while they wait, the drawing
    actors use it.
    """
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig

    cpu = (
        {"memory": _LITTLE} if kept else {"CPU": 1.0}
    )  # Ray Train insists that a worker asks for something
    resources = {"GPU": 1.0} if finetune.gpu else cpu
    return {
        "torch_config": TorchConfig(backend="nccl" if finetune.gpu else "gloo"),
        "scaling_config": ScalingConfig(
            num_workers=finetune.workers, use_gpu=finetune.gpu, resources_per_worker=resources
        ),
        # Ray Train insists on a folder of its own; nothing we keep lies there.
        "run_config": TrainRunConfig(
            name="deltas",
            storage_path=tempfile.mkdtemp(prefix="isic-train-"),
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
        ),
    }
