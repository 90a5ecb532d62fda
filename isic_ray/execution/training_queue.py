"""Training workers that wait for jobs, so that only the first job pays for a group's start."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from isic_ray.config.run import FinetuneConfig
from isic_ray.errors import UserError

_POLL_S = 0.1
_LITTLE = 1e6  # bytes
_MAX_FAILURES = 2  # worker groups that may be lost before the run fails

Place = tuple[int, int]  # a group, and the number of one of its jobs, counted from 0


class TrainingQueue:
    """An actor between those who submit jobs and the groups of workers that run them.

    Each group runs its own jobs in turn. A job counts as done only when its workers say so; a group
    that is started again gets its unfinished job again.
    """

    def __init__(self, groups: int = 1) -> None:
        self._jobs: list[list[Any]] = [[] for _ in range(groups)]
        self._outcomes: list[list[str]] = [[] for _ in range(groups)]
        self._closed = False

    def submit(self, job: Any) -> Place:
        """Queue a job for the group with the least to do; return its place."""
        pairs = zip(self._jobs, self._outcomes, strict=True)
        waiting = [len(jobs) - len(done) for jobs, done in pairs]
        group = waiting.index(min(waiting))
        self._jobs[group].append(job)
        return group, len(self._jobs[group]) - 1

    def job(self, group: int, number: int) -> Any:
        """Return a job; "wait" when it is not there yet, "end" when none will come."""
        if number < len(self._jobs[group]):
            return self._jobs[group][number]
        return "end" if self._closed else "wait"

    def finish(self, group: int, number: int, failure: str = "") -> None:
        """Note that a job is done, or why it cannot be: ``failure``, in one sentence."""
        if number == len(self._outcomes[group]):
            self._outcomes[group].append(failure)
            self._jobs[group][number] = None

    def outcome(self, group: int, number: int) -> str | None:
        """Return None while a job is open, "" when it is done, or why it cannot be done."""
        done = self._outcomes[group]
        return done[number] if number < len(done) else None

    def done(self, group: int) -> int:
        """Return how many of its jobs a group has finished."""
        return len(self._outcomes[group])

    def close(self) -> None:
        """Let the workers end once their jobs are done."""
        self._closed = True


def next_job(queue: Any, group: int, number: int) -> Any:
    """Wait, on a worker, for a job of its group and return it; None when none will come."""
    import ray

    while (job := ray.get(queue.job.remote(group, number))) == "wait":
        time.sleep(_POLL_S)
    return None if job == "end" else job


class TrainingGroups:
    """``count`` groups of ``finetune.workers`` workers, which start with the first job or `start`.

    When ``kept`` they live until `close`, else until the job is done. ``train_loop`` runs on every
    worker, with ``loop_config`` and, under "queue", "group" and "groups", the queue's actor, its
    group's number and how many groups there are. Once started, copies in other processes may run
    jobs too; the one that started the groups closes them.
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
        self._queue: Any = None
        self._fits: list[Any] = []  # Ray Train's calls, which last as long as the workers

    def start(self) -> None:
        """Start the groups, and do not wait for them."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._queue = ray.remote(num_cpus=0)(TrainingQueue).remote(self._count)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        fit = ray.remote(num_cpus=0, scheduling_strategy=here)(_fit)
        places = [
            {"queue": self._queue, "group": group, "groups": self._count}
            for group in range(self._count)
        ]
        settings = (self._finetune, self._kept)
        self._fits = [
            fit.remote(self._train_loop, {**self._loop_config, **place}, *settings)
            for place in places
        ]

    def run(self, job: dict[str, Any]) -> None:
        """Run a job on the group with the least to do, and return once it is done.

        Raises UserError for what cannot be trained, and what ended the workers early.
        """
        import ray

        if not self._fits:
            self.start()
        group, number = ray.get(self._queue.submit.remote(job))
        while (failure := ray.get(self._queue.outcome.remote(group, number))) is None:
            if ray.wait([self._fits[group]], timeout=_POLL_S)[0]:
                ray.get(self._fits[group])
                raise RuntimeError("the training workers ended before their work was done")
        if not self._kept:
            self.close()
        if failure:
            raise UserError(failure)

    def close(self) -> None:
        """Let the workers go, and do not wait for them.

        On a Ray without a dashboard, Ray Train ends up to 12 s after its workers: a helper of its
        own asks the dashboard whether the training lives.
        """
        if self._fits:
            self._queue.close.remote()
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
