"""Train the independent auditor, on drawings only."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.pictogram.auditor import KindClassifier
from isic_ray.pictogram.draw import draw
from isic_ray.pictogram.scene import KINDS
from isic_ray.pictogram.training.stages import Stage, jitter, to_pixels, training_scene


class AuditorStage(Stage):
    """The classifier learns to name all kinds that a drawing shows."""

    name = "auditor"
    learning_rate = 2e-3

    def __init__(self, *, steps: int = 1500) -> None:
        self.steps, self.batch_size = steps, 32
        self.module = KindClassifier()
        self._figures: dict[str, float] = {}

    def loss(self, step: int, rng: Random) -> Tensor:
        scenes = [training_scene(rng) for _ in range(self.batch_size)]
        images = np.stack([np.asarray(draw(scene, rng)) for scene in scenes])
        wanted = torch.tensor([[float(kind in scene.kinds) for kind in KINDS] for scene in scenes])
        logits = self.module(jitter(to_pixels(images), rng))
        right = ((logits > 0) == (wanted > 0.5)).all(1).float().mean().item()
        self._figures = {"exact": right}
        return F.binary_cross_entropy_with_logits(logits, wanted) * 5

    def report(self) -> dict[str, float]:
        return self._figures
