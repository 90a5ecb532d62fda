"""Does Ray get in the way? Weak scaling, overhead over a plain loop, and the driver's memory;
prints and writes JSON.

    python jobs/benchmark_cluster.py --out tests/results/cluster.json   # 8 minutes on 2 cores
    ray job submit --working-dir . -- \\
        python jobs/benchmark_cluster.py --parts weak-scaling --actors 1 32 256

weak-scaling: the real stage with actors that only wait, as a device would make them wait, 200 ms a
batch. overhead: the embedded model's shards in a plain loop and through one actor, by turns.
memory: a million samples, planned and dispatched.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from isic_ray.config.run import ExecutionConfig, LoopConfig, PromptsConfig, RunConfig, load_config
from isic_ray.execution.pool import RayWorkers
from isic_ray.execution.progress import Progress
from isic_ray.execution.session import ray_session
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Prompt
from isic_ray.runs.shards import plan_shards
from isic_ray.workflows.loop import create_run
from isic_ray.workflows.units import DrawUnit, JudgeUnit
from isic_ray.workflows.worker import ShardWorker

BATCH_S, BATCHES = 0.2, 10  # a simulated device's batch, and batches a shard
INSTANT = "instant"  # as the run's place: a device that takes no time
PARTS = ("weak-scaling", "overhead", "memory")
Figures = dict[str, Any]


class Device:
    """Loads nothing: takes as long for a shard as a device would, and no processor."""

    def __init__(self, config: RunConfig, uri: str) -> None:
        self.batches = 0 if uri == INSTANT else BATCHES

    def run(self, unit: JudgeUnit | DrawUnit) -> Figures:
        """Wait, and say when it began and ended."""
        began = time.time()
        for _ in range(self.batches):
            time.sleep(BATCH_S)
        return {"pid": os.getpid(), "began": began, "ended": time.time()}


class TimedWorker(ShardWorker):
    """Says when each shard ended."""

    def run(self, unit: DrawUnit | JudgeUnit) -> Figures:
        return super().run(unit) | {"ended": time.time()}


def weak_scaling(actors: int, shards_each: int) -> Figures:
    """Share of the time that actors work, from when the last has begun to when the first runs
    out of shards.
    """
    execution = ExecutionConfig(min_actors=actors, max_actors=actors, cpus_per_actor=0.05)
    units = [JudgeUnit(str(n), "", "") for n in range(actors * shards_each)]
    workers = RayWorkers(Device, RunConfig(execution=execution), "")
    rows = workers.run(units, [1] * len(units), Progress(io.StringIO()))
    by_actor: dict[int, list[Figures]] = {}
    for row in rows:
        by_actor.setdefault(row["pid"], []).append(row)
    begin = max(min(row["began"] for row in each) for each in by_actor.values())
    end = min(max(row["ended"] for row in each) for each in by_actor.values())
    busy = sum(max(0.0, min(row["ended"], end) - max(row["began"], begin)) for row in rows)
    work_s = sum(row["ended"] - row["began"] for row in rows) / len(rows)
    return {
        "actors": len(by_actor),
        "steady_s": round(end - begin, 2),
        "efficiency": round(busy / ((end - begin) * len(by_actor)) * BATCH_S * BATCHES / work_s, 4),
    }


def overhead(shards: int, repeats: int) -> Figures:
    """Seconds a shard in a plain loop in one process, and between commits of one actor in Ray
    Data; medians.
    """
    from isic_ray.models.registry import read_spec
    from isic_ray.prompts.sets import load_prompts

    base = load_config(
        "demo", ["prompts.limit=64", "execution.max_actors=1", "execution.min_actors=1"]
    )
    base = replace(base, execution=replace(base.execution, shard_size=16), loop=LoopConfig(arms=[]))
    prompts, spec = load_prompts(PromptsConfig(limit=64)), read_spec(base.model)
    names = [shard.name for shard in plan_shards(prompts, 1, 16) if shard.role == BENIGN][:shards]
    plain, ray_s = [], []
    for _ in range(repeats):
        run = create_run(base, tempfile.mkdtemp(prefix="isic-plain-"), prompts, spec)
        worker = ShardWorker(base, run.store.uri)
        worker.draw_shard(names[0])
        started = time.perf_counter()
        for name in names[1:]:
            worker.draw_shard(name)
        plain.append((time.perf_counter() - started) / (len(names) - 1))
        run = create_run(base, tempfile.mkdtemp(prefix="isic-ray-"), prompts, spec)
        units = [DrawUnit(name, "") for name in names]
        workers = RayWorkers(TimedWorker, base, run.store.uri)
        rows = workers.run(units, [16] * len(units), Progress(io.StringIO()))
        ends = sorted(row["ended"] for row in rows)
        ray_s.append((ends[-1] - ends[0]) / (len(ends) - 1))
    extra = statistics.median(r / p - 1 for r, p in zip(ray_s, plain, strict=True))
    seconds = {
        "plain_s": round(statistics.median(plain), 3),
        "ray_s": round(statistics.median(ray_s), 3),
    }
    return {
        "shards": len(names),
        "pictures_a_shard": 16,
        "repeats": repeats,
        **seconds,
        "overhead": round(extra, 4),
    }


def memory(samples: int, samples_per_prompt: int) -> Figures:
    """Peak memory of this driver while it plans so many samples and dispatches their shards."""
    before = _peak()
    count = samples // samples_per_prompt
    prompts = [
        Prompt(
            f"p{n}",
            f"prompt number {n}, about as long as a caption is",
            role,
            split,
            ("weapon",),
            (),
        )
        for role in (UNSAFE, BENIGN)
        for split in (BUILD, HELD_OUT)
        for n in range(count // 4)
    ]
    shards = plan_shards(prompts, samples_per_prompt, 128)
    execution = ExecutionConfig(min_actors=2, max_actors=2, cpus_per_actor=0.05)
    units = [DrawUnit(shard.name, "") for shard in shards]
    started = time.perf_counter()
    workers = RayWorkers(Device, RunConfig(execution=execution), INSTANT)
    rows = workers.run(units, [128] * len(units), Progress(io.StringIO()))
    return {
        "samples": sum(len(shard.cells) for shard in shards),
        "prompts": len(prompts),
        "shards": len(rows),
        "shards_per_s": round(len(rows) / (time.perf_counter() - started), 1),
        "peak_driver_mib": _peak(),
        "before_mib": before,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--actors", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--shards", type=int, default=12, help="shards an actor")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--hardware",
        default=f"{os.cpu_count()}-core {platform.machine()}",
        help="named in the JSON",
    )
    parser.add_argument("--out", type=Path, help="JSON file; parts that are not run now stay in it")
    options = parser.parse_args()
    result: Figures = (
        json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    )
    result["hardware"] = options.hardware
    with ray_session(ExecutionConfig()):
        if "memory" in options.parts:  # first: a peak never falls
            result["memory"] = [memory(1_000_000, each) for each in (4, 1)]
        if "weak-scaling" in options.parts:
            result["weak_scaling"] = [
                weak_scaling(actors, options.shards) for actors in options.actors
            ]
        if "overhead" in options.parts:
            result["overhead"] = overhead(8, options.repeats)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
