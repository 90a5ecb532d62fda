"""One group of Ray Train workers that waits for deltas to train, so that only the first of them pays for its start."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from isic_ray.config import FinetuneConfig, RunConfig

_POLL_S = 0.1
_LITTLE = 1e6  # bytes
_MAX_FAILURES = 2  # worker groups that may be lost before the run fails


class Desk:
    """An actor between the driver, which gives orders, and the workers, which carry them out in turn.

    An order counts as done only when its worker says so; a group that is started anew gets an unfinished one again.
    """

    def __init__(self) -> None:
        self._orders: list[Any] = []
        self._done, self._closed = 0, False

    def give(self, order: Any) -> int:
        """Returns what `done` will be once this order is carried out."""
        self._orders.append(order)
        return len(self._orders)

    def order(self, number: int) -> Any:
        """Order ``number``, counted from 0; "wait" when it is not there yet, "end" when none will come."""
        if number < len(self._orders):
            return self._orders[number]
        return "end" if self._closed else "wait"

    def finish(self, number: int) -> None:
        self._done = max(self._done, number + 1)

    def done(self) -> int:
        return self._done

    def close(self) -> None:
        self._closed = True


def next_order(desk: Any, number: int) -> Any:
    """Called by a worker: order ``number``, waited for; None when none will come."""
    import ray

    while (order := ray.get(desk.order.remote(number))) == "wait":
        time.sleep(_POLL_S)
    return None if order == "end" else order


class TrainingGroup:
    """Starts its workers with the first order. With ``execution.keep_workers`` they live until `close`, else until the
    order is done. ``train_loop`` runs on every worker, with ``loop_config`` and the desk under "desk"."""

    def __init__(self, config: RunConfig, train_loop: Any, loop_config: dict[str, Any]) -> None:
        self._config, self._train_loop, self._loop_config = config, train_loop, loop_config
        self._desk: Any = None
        self._fit: Any = None  # Ray Train's call, which lasts as long as the workers

    def __enter__(self) -> TrainingGroup:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def carry_out(self, order: dict[str, Any]) -> None:
        """Returns once the workers have; raises what ended them early."""
        import ray

        if self._fit is None:
            self._start()
        number = ray.get(self._desk.give.remote(order))
        while ray.get(self._desk.done.remote()) < number:
            if ray.wait([self._fit], timeout=_POLL_S)[0]:
                ray.get(self._fit)
                raise RuntimeError("the training workers ended before their work was done")
        if not self._config.execution.keep_workers:
            self.close()

    def close(self) -> None:
        """Lets the workers go, and does not wait for it.

        On a Ray without a dashboard, Ray Train ends up to 12 s after its workers: a helper of its own asks the
        dashboard whether the training lives.
        """
        if self._fit is not None:
            self._desk.close.remote()
            self._fit = None

    def _start(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._desk = ray.remote(num_cpus=0)(Desk).remote()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        fit = ray.remote(num_cpus=0, scheduling_strategy=here)(_fit)
        settings = (self._config.finetune, self._config.execution.keep_workers)
        self._fit = fit.remote(self._train_loop, {**self._loop_config, "desk": self._desk}, *settings)


def _fit(train_loop: Any, loop_config: dict[str, Any], finetune: FinetuneConfig, kept: bool) -> None:
    """A task: Ray Train, which blocks and handles Ctrl-C by itself, so it is not for a driver that does other work."""
    from ray.train.torch import TorchTrainer

    TorchTrainer(train_loop, train_loop_config=loop_config, **_trainer_settings(finetune, kept)).fit()


def _trainer_settings(finetune: FinetuneConfig, kept: bool) -> dict[str, Any]:
    """Ray Train's settings. Workers that are kept ask for no CPU: while they wait, the drawing actors use it."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig

    cpu = {"memory": _LITTLE} if kept else {"CPU": 1.0}  # Ray Train insists that a worker asks for something
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
