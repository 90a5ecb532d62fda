"""Settings of `isic retrain`: a codebook retrained in the harmless space on pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from isic_ray.config import reading as check
from isic_ray.errors import UserError


@dataclass(frozen=True)
class RetrainConfig:
    """What is trained, on what, and how. Set with ``--set KEY=VALUE``."""

    run: str  # finished run: its model, its edited codebook and its harmful space
    pictures: str  # folder of pictures, or of Parquet files or WebDataset tars that hold them
    steps: int = 1000  # optimiser steps; the pictures are shuffled anew whenever all have been seen
    batch_size: int = 64  # pictures an optimiser step, over all workers
    micro_batch: int = (
        32  # pictures a worker holds at once; smaller needs less memory, and accumulates gradients
    )
    learning_rate: float = 0.002  # of Adam at the first step; falls to 0
    regulariser: float = 0.0001  # weight of ||delta||^2 / rows
    rank: int = 2  # dimensions of the harmful space that the delta keeps out of
    bf16: bool = False  # decode in bfloat16; the table, its delta and Adam's moments stay float32
    shuffle: int = 2048  # pictures a worker shuffles among, besides the order of the files
    evaluate: int = 256  # pictures set aside and decoded again every save
    save_every: int = 100  # steps between checkpoints; as much is lost with a worker
    workers: int = 1  # data-parallel workers at the most
    min_workers: int = 0  # go on with as few when others are lost; 0 = wait for all
    zero_stage: int = 0  # DeepSpeed ZeRO 0-3
    gpu: bool = False  # a GPU for each worker
    max_failures: int = 10  # lost workers before the job gives up
    seed: int = 0  # of the shuffling

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "micro_batch",
            "shuffle",
            "evaluate",
            "save_every",
            "workers",
            "rank",
        ):
            check.least(name, getattr(self, name), 1)
        check.that(
            0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "above 0"
        )
        check.least("regulariser", self.regulariser, 0)
        check.that(self.zero_stage in (0, 1, 2, 3), "zero_stage", self.zero_stage, "0, 1, 2 or 3")
        check.that(
            0 <= self.min_workers <= self.workers,
            "min_workers",
            self.min_workers,
            "from 0 to workers",
        )
        if self.batch_size % (self.micro_batch * self.workers):
            raise UserError(
                f"batch_size is {self.batch_size}, but must be a multiple of micro_batch ({self.micro_batch}) "
                f"times workers ({self.workers})."
            )

    def accumulate(self, workers: int) -> int:
        """Micro-batches an optimiser step; with an odd number of workers left, the batch is
        rounded up.
        """
        return -(-self.batch_size // (self.micro_batch * workers))


def retrain_config(run: str, pictures: str, overrides: Sequence[str] = ()) -> RetrainConfig:
    """Defaults with ``KEY=VALUE`` on top. Raises UserError for unknown keys, wrong types and bad
    values.
    """
    types = {option.name: str(option.type) for option in dataclasses.fields(RetrainConfig)}
    values = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        where = f"--set {override!r}: "
        if not equals or name.strip() not in types:
            raise UserError(
                f"{where}write it as KEY=VALUE; did you mean {check.closest(name.strip(), list(types))}?"
            )
        kind = types[name.strip()]
        values[name.strip()] = check.typed(
            name.strip(), kind, check.parse_value(text, kind, where), where
        )
    return RetrainConfig(**{"run": run, "pictures": pictures, **values})
