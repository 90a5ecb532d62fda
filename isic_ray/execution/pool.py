"""Actors that run units of work: each loads its worker once, and then runs any number of units.

The pool knows nothing of the work: it is given a class whose instances have ``run(unit)``, which
returns counts as a JSON object, and units that pickle and name their ``kind``. Nothing heavy is
imported here, since Ray Data's own processes load this file to pass units on.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from isic_ray.errors import UserError
from isic_ray.execution.progress import Meter, Progress, Throughput

if TYPE_CHECKING:
    from isic_ray.config.run import ExecutionConfig, RunConfig

# An actor that cannot start for good fails the run after so many tries in a row.
_LOST_WHILE_LOADING = 3

Batch = dict[str, Any]
Counts = dict[str, Any]


class Worker(Protocol):
    """What an actor holds."""

    def run(self, unit: Any) -> Counts:
        """Run one unit and return its counts."""
        ...


WorkerClass = Callable[["RunConfig", str], Worker]


class RayWorkers:
    """Workers of the run at ``uri``: actors that start for each call, or that are kept.

    They are kept with ``execution.keep_workers``, or when a ``pool`` is given, which is then left
    alive by `close`.
    """

    def __init__(
        self,
        worker_class: WorkerClass,
        config: RunConfig,
        uri: str,
        pool: ActorPool | None = None,
    ) -> None:
        self._worker_class, self._config, self._uri = worker_class, config, uri
        self._pool, self._own = pool, pool is None

    def run(self, units: Sequence[Any], sizes: Sequence[int], progress: Progress) -> list[Counts]:
        """Run each unit once and return the counts, in the order in which units end.

        A unit that was committed by a killed attempt is found committed and costs nothing.
        """
        if not units:
            return []
        if self._pool is None and self._config.execution.keep_workers:
            self._pool = ActorPool(self._worker_class, self._config, self._uri)
        done: list[Counts] = []
        typical = sum(sizes) / len(units)
        throughput = Throughput(len(units), self._config.execution.price_per_hour)
        for row in self._stream(units).iter_rows():
            done.append(json.loads(row["result"]))
            progress.figures = throughput.add(done[-1], typical)
            progress.advance(round(typical))
        return done

    def close(self) -> None:
        """End the kept actors that this object started."""
        if self._pool and self._own:
            self._pool.close()
            self._pool = None

    def _stream(self, units: Sequence[Any]) -> Any:
        """A Ray Data set of the units' counts as JSON, which is computed as it is read."""
        import ray

        execution = self._config.execution
        _configure_data(execution)
        rows = [{"unit": _packed(unit)} for unit in units]
        if self._pool:
            # Two tasks pass some units on at a time, so that no actor waits for Ray Data.
            blocks = math.ceil(len(units) / self._pool.size)
            dataset = ray.data.from_items(rows, override_num_blocks=blocks)
            return dataset.map_batches(
                self._pool.dispatch_batch, batch_size=None, num_cpus=0, concurrency=2
            )
        most = max(execution.max_actors, execution.min_actors)
        return ray.data.from_items(rows, override_num_blocks=len(units)).map_batches(
            WorkerActor,
            fn_constructor_args=(self._worker_class, self._config, self._uri),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(execution.min_actors, len(units)), max_size=min(most, len(units))
            ),
            **_resources(execution),
        )


class WorkerActor:
    """An actor: one worker, and what it counts for Ray's metrics."""

    def __init__(self, worker_class: WorkerClass, config: RunConfig, uri: str) -> None:
        import torch

        execution = config.execution
        torch.set_num_threads(
            execution.threads_per_actor or max(1, math.ceil(execution.cpus_per_actor))
        )
        self._meter = Meter()
        self._refusal: UserError | None = None
        try:
            self._worker = worker_class(config, uri)
        except UserError as error:
            # Raised here, Ray would tell it in its own words, and try once more.
            self._refusal = error

    def __call__(self, batch: Batch) -> dict[str, list[str]]:
        """Run the units of a batch and return their counts as JSON."""
        from isic_ray.runs.quarantine import DeviceLost

        if self._refusal:
            raise self._refusal
        try:
            return {"result": [json.dumps(self._run(_unpacked(unit))) for unit in batch["unit"]]}
        except DeviceLost:  # Ray starts a new process, and quarantine finds the row that did it
            os._exit(1)

    def _run(self, unit: Any) -> Counts:
        started = time.monotonic()
        counts = self._worker.run(unit)
        return counts | self._meter.count(unit.kind, counts, time.monotonic() - started)


class ActorPool:
    """``execution.max_actors`` actors that outlive a stage, until `close` or Ray's end.

    For runs on one machine, where starting actors costs as much as judging, and for trials, which
    share them. An actor that dies is started again and repeats its unit, which finds what was
    committed. A pool pickles: copies in other processes may use it too.
    """

    def __init__(self, worker_class: WorkerClass, config: RunConfig, uri: str) -> None:
        import ray

        self.size = config.execution.max_actors
        resources = _resources(config.execution)
        remote = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(WorkerActor)
        self._actors = [remote.remote(worker_class, config, uri) for _ in range(self.size)]
        self._dispatcher = ray.remote(num_cpus=0)(_Dispatcher).remote(self._actors)
        self._dispatcher.admit.remote()

    def run(self, units: Sequence[Any], sizes: Sequence[int], progress: Progress) -> list[Counts]:
        """Run the units and return their counts in the order of the units."""
        answers = self._map([{"unit": [_packed(unit)]} for unit in units])
        return [json.loads(answer["result"][0]) for answer in answers]

    def dispatch_batch(self, batch: Batch) -> Batch:
        """Run the units of a batch, each on whichever actor is free; a map function of Ray Data."""
        answers = self._map([{"unit": [unit]} for unit in batch["unit"]])
        return {"result": [answer["result"][0] for answer in answers]}

    def close(self) -> None:
        """End the actors; what they are working on is left undone."""
        import ray

        for actor in (*self._actors, self._dispatcher):
            ray.kill(actor)

    def _map(self, batches: list[Batch]) -> list[Batch]:
        import ray

        answers: list[Batch] = ray.get([self._dispatcher.dispatch.remote(b) for b in batches])
        return answers


class _Dispatcher:
    """An actor that gives each batch to a free actor of a pool.

    An actor that still loads its worker, or waits for its CPUs, is not free.
    """

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        # Actors, or the exception that one died of before it was ready.
        self._free: asyncio.Queue[Any] = asyncio.Queue()

    async def admit(self) -> None:
        """Let every actor take batches once it is ready; call it once."""
        await asyncio.gather(*(self._admit(actor) for actor in self._actors))

    async def dispatch(self, batch: Batch) -> Batch:
        """Send a batch to a free actor and return its result.

        Re-raises the actor's exception, or the one that prevented it from starting.
        """
        actor = await self._free.get()
        try:
            if isinstance(actor, Exception):
                raise actor
            answer: Batch = await actor.__call__.remote(batch)
            return answer
        finally:
            self._free.put_nowait(actor)

    async def _admit(self, actor: Any) -> None:
        try:
            await actor.__ray_ready__.remote()
        except Exception as error:
            self._free.put_nowait(error)
        else:
            self._free.put_nowait(actor)


def _packed(unit: Any) -> str:
    """A unit as text: Ray Data's columns hold no objects."""
    return base64.b64encode(pickle.dumps(unit)).decode()


def _unpacked(text: Any) -> Any:
    return pickle.loads(base64.b64decode(str(text)))


def _resources(execution: ExecutionConfig) -> dict[str, Any]:
    """What Ray sets aside for each actor, as arguments of ``ray.remote``."""
    return {
        "num_cpus": execution.cpus_per_actor,
        "num_gpus": execution.gpus_per_actor or None,
        "resources": {execution.accelerator: 1} if execution.accelerator else None,
    }


def _configure_data(execution: ExecutionConfig) -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = execution.patience_s
    # A machine may go while an actor loads the model, and actors that still wait for one are
    # cancelled at the end of a stage, which Ray Data counts as deaths too. By default the first of
    # them fails the run.
    context.max_consecutive_actor_init_deaths = (
        max(execution.min_actors, execution.max_actors) + _LOST_WHILE_LOADING
    )
