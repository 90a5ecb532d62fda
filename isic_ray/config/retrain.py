"""Settings of `isic retrain`: a codebook retrained in the harmless space on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import model_validator

from isic_ray.config.reading import parse_value
from isic_ray.config.section import closest, fields_in, settings, written_in
from isic_ray.config.values import Count, NotNegative, OneOrMore, Positive, ZeroStage, kind_of
from isic_ray.errors import UserError


@settings("")
class RetrainConfig:
    """What is trained, on what, and how. Set with ``--set KEY=VALUE``."""

    run: str
    """Finished run: its model, its edited codebook and its harmful space are used."""
    pictures: str
    """Folder of pictures, or of Parquet files or WebDataset tars that hold them."""
    steps: OneOrMore = 1000
    """Optimiser steps; the pictures are shuffled again whenever all have been seen."""
    batch_size: OneOrMore = 64
    """Pictures per optimiser step, over all workers."""
    micro_batch: OneOrMore = 32
    """Pictures that a worker holds at once; fewer need less memory and accumulate gradients."""
    learning_rate: Positive = 0.002
    """Adam's learning rate at the first step; it falls to 0."""
    regulariser: NotNegative = 0.0001
    """Weight of ||delta||^2 / rows."""
    rank: OneOrMore = 2
    """Dimensions of the harmful space that the delta stays out of."""
    bf16: bool = False
    """Decode in bfloat16; the table, its delta and Adam's moments stay float32."""
    shuffle: OneOrMore = 2048
    """Pictures that a worker shuffles among, besides the order of the files."""
    evaluate: OneOrMore = 256
    """Pictures that are not trained on, and decoded again whenever a checkpoint is saved."""
    save_every: OneOrMore = 100
    """Steps between checkpoints; a lost worker loses at most as many."""
    workers: OneOrMore = 1
    """Most data-parallel workers."""
    min_workers: Count = 0
    """Continue with as few workers when others are lost; 0 = wait for all."""
    zero_stage: ZeroStage = 0
    """Stage of DeepSpeed's ZeRO, 0 to 3."""
    gpu: bool = False
    """A GPU for each worker."""
    max_failures: int = 10
    """Lost workers before the job gives up."""
    seed: int = 0
    """Seed of the shuffling."""

    @model_validator(mode="after")
    def _workers_fit(self) -> Self:
        if self.min_workers > self.workers:
            raise UserError(f"min_workers is {self.min_workers}, but must be from 0 to workers.")
        if self.batch_size % (self.micro_batch * self.workers):
            raise UserError(
                f"batch_size is {self.batch_size}, but must be a multiple of micro_batch "
                f"({self.micro_batch}) times workers ({self.workers})."
            )
        return self

    def accumulate(self, workers: int) -> int:
        """Return the micro-batches per optimiser step; the batch is rounded up where it must be."""
        return -(-self.batch_size // (self.micro_batch * workers))


def retrain_config(run: str, pictures: str, overrides: Sequence[str] = ()) -> RetrainConfig:
    """Return the defaults with ``KEY=VALUE`` overrides on top.

    Raises UserError, one sentence, for an unknown key, a wrong type or a bad value.
    """
    fields = fields_in(RetrainConfig)
    values: dict[str, Any] = {"run": run, "pictures": pictures}
    places = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        name, where = name.strip(), f"--set {override!r}: "
        if not equals or name not in fields:
            meant = closest(name, list(fields))
            raise UserError(f"{where}write it as KEY=VALUE; did you mean {meant}?")
        values[name] = parse_value(text, kind_of(fields[name].annotation), where)
        places[name] = where
    with written_in(places):
        return RetrainConfig(**values)
