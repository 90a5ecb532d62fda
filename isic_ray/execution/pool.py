"""Mass generation and self-judging with Ray Data: pending shards in, committed shards out."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from isic_ray.config.run import ExecutionConfig, RunConfig
from isic_ray.errors import UserError
from isic_ray.execution.progress import Meter, Progress, Throughput
from isic_ray.runs.quarantine import DeviceLost
from isic_ray.workflows.worker import ShardWorker

Unit = dict[
    str, str
]  # {"do": "draw" | "judge", "shard": name, "codebook": digest, "known": digest}
_LOST_WHILE_LOADING = (
    3  # actors in a row; an actor that cannot start for good fails the run after so many tries
)


class ShardActor:
    """Ray Data's actor: one model load, then any number of units."""

    worker: type[ShardWorker] = ShardWorker

    def __init__(self, config: RunConfig, uri: str) -> None:
        import torch

        execution = config.execution
        torch.set_num_threads(
            execution.threads_per_actor or max(1, math.ceil(execution.cpus_per_actor))
        )
        self._meter = Meter()
        self._refusal: UserError | None = None
        try:
            self._worker = self.worker(config, uri)
        except (
            UserError
        ) as error:  # raised here, Ray would say it in its own words, and try once more
            self._refusal = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        if self._refusal:
            raise self._refusal
        try:
            return self._results(batch)
        except DeviceLost:  # Ray starts a new process, and `isolation` finds the row that did it
            os._exit(1)

    def _results(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {
            "result": [json.dumps(self._timed(json.loads(str(unit)))) for unit in batch["unit"]]
        }

    def _timed(self, unit: Unit) -> dict[str, Any]:
        started = time.monotonic()
        counts = self._do(unit)
        counts["tokens"] = self._worker.model.tokens_per_image * (
            counts.get("sampled", 0) + counts.get("rewritten", 0)
        )
        return counts | self._meter.count(unit["do"], counts, time.monotonic() - started)

    def _do(self, unit: Unit) -> dict[str, Any]:
        if unit["do"] == "draw":
            return self._worker.draw_shard(unit["shard"])
        return self._worker.judge_shard(unit["shard"], unit["codebook"], unit.get("known", ""))


def work(
    config: RunConfig,
    uri: str,
    units: Sequence[Unit],
    sizes: Callable[[Unit], int],
    progress: Progress,
    actor: type[ShardActor] = ShardActor,
    crew: ActorPool | None = None,
) -> list[dict[str, Any]]:
    """Run every unit once on a pool of actors, or on the ``crew``, and return their counts, in the
    order they finish.

    A unit that was committed by a killed attempt is found committed and costs nothing.
    """
    import ray

    if not units:
        return []
    execution = config.execution
    _configure_data(execution)
    rows = [{"unit": json.dumps(unit)} for unit in units]
    if crew:  # two tasks hand over some units at a time, so that no member waits for Ray Data
        dataset = ray.data.from_items(rows, override_num_blocks=math.ceil(len(units) / crew.size))
        results = dataset.map_batches(crew.hand_over, batch_size=None, num_cpus=0, concurrency=2)
    else:
        dataset = ray.data.from_items(rows, override_num_blocks=len(units))
        results = dataset.map_batches(
            actor,
            fn_constructor_args=(config, uri),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(execution.min_actors, len(units)),
                max_size=min(max(execution.max_actors, execution.min_actors), len(units)),
            ),
            **_resources(execution),
        )
    done = []
    typical = sum(sizes(unit) for unit in units) / len(units)
    throughput = Throughput(len(units), execution.price_per_hour)
    for row in results.iter_rows():
        done.append(json.loads(row["result"]))
        progress.figures = throughput.add(done[-1], typical)
        progress.advance(round(typical))
    return done


def start_pool(config: RunConfig, uri: str) -> ActorPool:
    """Drawing and judging actors for many stages; each loads the model once."""
    return ActorPool(
        ShardActor, config.execution.max_actors, (config, uri), **_resources(config.execution)
    )


def _resources(execution: ExecutionConfig) -> dict[str, Any]:
    """What Ray sets aside for each actor."""
    return {
        "num_cpus": execution.cpus_per_actor,
        "num_gpus": execution.gpus_per_actor or None,
        "resources": {execution.accelerator: 1} if execution.accelerator else None,
    }


def _configure_data(execution: ExecutionConfig) -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = execution.patience_s
    # A machine may go while an actor loads the model, and actors still waiting for one are
    # cancelled at the end of a stage, which Ray Data counts as deaths too. By default the first of
    # them fails the run.
    context.max_consecutive_actor_init_deaths = (
        max(execution.min_actors, execution.max_actors) + _LOST_WHILE_LOADING
    )


Batch = dict[str, Any]


class Dispatcher:
    """An actor that gives each batch to a free member; one that still loads, or waits for its
    CPUs, is not free.
    """

    def __init__(self, members: list[Any]) -> None:
        self._members = members
        self._free: asyncio.Queue[Any] = (
            asyncio.Queue()
        )  # members, or what one died of before it was ready

    async def join(self) -> None:
        """Lets every member in once it is ready; call it once."""
        await asyncio.gather(*(self._join(member) for member in self._members))

    async def hand_over(self, batch: Batch) -> Batch:
        """The member's answer; raises what it raises, and what kept a member from starting."""
        member = await self._free.get()
        try:
            if isinstance(member, Exception):
                raise member
            answer: Batch = await member.__call__.remote(batch)
            return answer
        finally:
            self._free.put_nowait(member)

    async def _join(self, member: Any) -> None:
        try:
            await member.__ray_ready__.remote()
        except Exception as error:
            self._free.put_nowait(error)
        else:
            self._free.put_nowait(member)


class ActorPool:
    """``size`` actors of one class and their dispatcher, until `close` or Ray's end.

    A member that dies is started anew and does its batch again, which finds what was committed.
    """

    def __init__(
        self, actor: type, size: int, arguments: tuple[Any, ...], **resources: Any
    ) -> None:
        import ray

        remote = ray.remote(max_restarts=-1, max_task_retries=-1, **resources)(actor)
        self.size = size
        self._members = [remote.remote(*arguments) for _ in range(size)]
        self._dispatcher = ray.remote(num_cpus=0)(Dispatcher).remote(self._members)
        self._dispatcher.join.remote()

    def hand_over(self, batch: Batch) -> Batch:
        """The answers for a batch of units, each done alone by whoever is free; as Ray Data's
        map function.
        """
        answers = self.map([{"unit": [unit]} for unit in batch["unit"]])
        return {
            name: [value for answer in answers for value in answer[name]] for name in answers[0]
        }

    def map(self, batches: list[Batch]) -> list[Batch]:
        """All batches, answers in their order."""
        import ray

        answers: list[Batch] = ray.get(
            [self._dispatcher.hand_over.remote(batch) for batch in batches]
        )
        return answers

    def close(self) -> None:
        """Ends the actors; what they are at is left undone."""
        import ray

        for actor in (*self._members, self._dispatcher):
            ray.kill(actor)
