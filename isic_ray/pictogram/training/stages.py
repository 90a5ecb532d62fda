"""What every stage of the embedded model's training is: a module, a loss per step, a schedule.

The stages are in `picture_tokens`, `skills` and `auditor`, pure torch; how they are run is in
`isic_ray.execution.pretraining`. Every batch is a function of (stage, step, rank) alone, so a
resumed stage sees the batches it would have seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isic_ray.pictogram.scene import Scene, sample_scene


class Stage(ABC):
    """One part of the training."""

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    module: nn.Module

    @abstractmethod
    def loss(self, step: int, rng: Random) -> Tensor:
        """Return the scalar loss of this rank's batch at ``step``.

        ``rng`` is seeded by (stage, step, rank).
        """

    def after_step(self, step: int) -> None:  # noqa: B027 (most stages have nothing to do)
        """Do what is due after the optimiser's step."""

    def report(self) -> dict[str, float]:
        """Return figures worth a line in the log."""
        return {}


def training_scene(rng: Random) -> Scene:
    """Draw a scene that training may show: 45 % hold one unsafe kind, 5 % two, none is held out."""
    while True:
        roll = rng.random()
        scene = sample_scene(rng, unsafe=None if roll < 0.05 else roll < 0.5)
        if not scene.is_held_out:
            return scene


def to_pixels(images: np.ndarray) -> Tensor:
    """Return pictures uint8 ``[B,H,W,3]`` as float32 ``[B,3,H,W]`` in [-1, 1], as Janus expects."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def jitter(pixels: Tensor, rng: Random) -> Tensor:
    """Add light noise, blur and brightness to pixels ``[B,3,H,W]``.

    What learns from them does not depend on crisp edges then.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    if rng.random() < 0.3:
        pixels = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.randn(pixels.shape, generator=generator) * (0.12 * rng.random())
    return pixels * (1 + 0.1 * (rng.random() - 0.5)) + 0.1 * (rng.random() - 0.5) + noise
