"""A whole run in one process, without Ray: the same loop, the same worker, the same writes, in
seconds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isic_ray.config.run import RunConfig
from isic_ray.execution.progress import Progress
from isic_ray.execution.training import DeltaJob
from isic_ray.metrics.summary import Summary
from isic_ray.models.base import ModelSpec
from isic_ray.prompts.sets import load_prompts
from isic_ray.workflows.loop import create_run, improve
from isic_ray.workflows.steps import Steps
from isic_ray.workflows.worker import ShardWorker
from isic_ray.workflows.workers import InlineWorkers
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


def no_training(jobs: Sequence[DeltaJob], rows: np.ndarray) -> list[torch.Tensor]:
    """Refuse to train: a run without Ray has finetune.steps 0."""
    raise AssertionError("this run has no training workers")


def drive(out: str, spec: ModelSpec, config: RunConfig = SMALL) -> Summary:
    """`isic run`, without Ray."""
    prompts = load_prompts(config.prompts)
    run = create_run(config, out, prompts, spec)
    progress = Progress(io.StringIO(), watch=run.write_progress)
    workers = InlineWorkers(ShardWorker, config, run.store.uri)
    return improve(config, Steps(config, run, prompts, spec, workers, no_training, progress))
