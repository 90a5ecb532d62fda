"""What later rounds cost next to the first; a part of `jobs/benchmark.py`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isic_ray.config.run import load_config
from isic_ray.execution.training import DeltaJob
from isic_ray.prompts.sets import load_prompts
from isic_ray.runs.schema import BUILD, HELD_OUT

Figures = dict[str, Any]


def rounds(limit: int) -> Figures:
    """Measure judging again after a selective edit, next to drawing, judging and pairing.

    In one thread. Held-out pictures are judged to decide a round; the others are judged again where
    another round follows. What that costs depends on which codebook rows changed, not on how: in
    place of fine-tuning, every row that it may move is moved a little.
    """
    from isic_ray.execution.progress import Progress
    from isic_ray.models.registry import read_spec
    from isic_ray.workflows.loop import create_run
    from isic_ray.workflows.steps import Steps
    from isic_ray.workflows.worker import ShardWorker
    from isic_ray.workflows.workers import InlineWorkers

    demo = load_config("demo")
    config = replace(
        demo,
        prompts=replace(demo.prompts, limit=limit),
        edit=replace(demo.edit, method="selective"),
        execution=replace(demo.execution, shard_size=limit),
    )
    prompts, spec = load_prompts(config.prompts), read_spec(config.model)
    with tempfile.TemporaryDirectory() as out:
        run = create_run(config, out, prompts, spec)
        workers = TimedWorkers(InlineWorkers(ShardWorker, config, run.store.uri))
        steps = Steps(config, run, prompts, spec, workers, move_a_little, Progress())
        torch.set_num_threads(1)
        base = steps.draw_and_judge()
        first = workers.seconds
        edit = steps.edit(config.edit, spec.codebook, steps.pairs)
        result: Figures = {
            "pictures": len(steps.samples),
            "pairs": len(steps.pairs),
            "drawing_s": round(first, 2),
        }
        tables = {
            "edited": edit.codebook,
            "edited and fine-tuned": steps.finetune(edit, base, 1),
        }
        for name, table in tables.items():
            digest = steps.publish(table, 1, name)
            seconds, touched = {}, {}
            for split in (HELD_OUT, BUILD):
                steps.judge([digest], steps.of(split), name)
                seconds[split], touched[split] = workers.seconds, steps.touched[digest]
            result[name] = {
                "rows": int((table != spec.codebook).any(1).sum()),
                "touched": sum(touched.values()),
                "deciding_touched": touched[HELD_OUT],
                "deciding_s": round(seconds[HELD_OUT], 2),
                "deciding_share": round(seconds[HELD_OUT] / first, 3),
                "going_on_s": round(seconds[BUILD], 2),
                "going_on_share": round(seconds[BUILD] / first, 3),
            }
    return result


def move_a_little(jobs: Sequence[DeltaJob], rows: Any) -> list[Tensor]:
    """Move every row that fine-tuning may move; stands in for training."""
    moved = []
    for job in jobs:
        near = job.edited + 1e-3 * torch.randn_like(job.edited)
        assert job.trainable is not None
        moved.append(torch.where(job.trainable[:, None], near, job.edited))
    return moved


class TimedWorkers:
    """Workers, and how many seconds their last call took."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds = inner, 0.0

    def run(self, units: Any, sizes: Any, progress: Any) -> list[dict[str, Any]]:
        began = time.perf_counter()
        counts: list[dict[str, Any]] = self.inner.run(units, sizes, progress)
        self.seconds = time.perf_counter() - began
        return counts

    def close(self) -> None:
        self.inner.close()


def medians(takes: list[Figures]) -> Figures:
    """Return the median of each figure over several takes."""
    return {
        key: medians([take[key] for take in takes])
        if isinstance(value, dict)
        else statistics.median(take[key] for take in takes)
        for key, value in takes[0].items()
    }
