"""A whole run in one process, without Ray: the same loop, the same worker, the same writes, in
seconds.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from isic_ray.config.run import RunConfig
from isic_ray.execution.pool import Unit
from isic_ray.execution.progress import Progress
from isic_ray.models.base import ModelSpec
from isic_ray.prompts.sets import load_prompts
from isic_ray.workflows.loop import IsicLoop, Record, create_run
from isic_ray.workflows.worker import ShardWorker
from tests.faults.small import SMALL


class Remembering:
    """A model or auditor that computes each answer once; its answers are deterministic."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.answers = inner, dict[bytes, Any]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in ("sample", "decode", "judge", "judge_each", "rewrite", "score"):
            return found

        def answer(*arguments: Any) -> Any:
            key = b"/".join([name.encode(), *map(_bytes_of, arguments)])
            if key not in self.answers:
                self.answers[key] = found(*arguments)
            return self.answers[key]

        return answer


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    return (
        f"{value.shape}".encode() + value.tobytes()
        if isinstance(value, np.ndarray)
        else repr(value).encode()
    )


class InlineLoop(IsicLoop):
    """The loop with its worker in the same process."""

    def work(self, stage: str, units: list[Unit]) -> list[dict[str, Any]]:
        self.progress.start(stage, len(units), "units")
        worker = ShardWorker(self.config, self.run_dir.store.uri)
        return [
            worker.draw_shard(unit["shard"])
            if unit["do"] == "draw"
            else worker.judge_shard(unit["shard"], unit["codebook"])
            for unit in units
        ]


def drive(out: str, facts: ModelSpec, config: RunConfig = SMALL) -> Record:
    """`isic run`, without Ray. Returns the summary."""
    prompts = load_prompts(config.prompts)
    run = create_run(config, out, prompts, facts)
    return InlineLoop(
        config, run, prompts, facts, Progress(io.StringIO(), watch=run.write_progress)
    ).run()
