"""Show what a model's own judge sees of a picture, as a differentiable function of the pixels."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.models.base import Perceiver


class TowerPerceiver(Perceiver):
    """A frozen float32 copy of a transformers vision tower, behind its processor's resizing."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, tower: Any, size: tuple[int, int], mean: list[float], std: list[float]
    ) -> None:
        """Copy ``tower``, which takes pictures of ``size`` (height, width) in pixels.

        ``mean`` and ``std`` are the processor's, one per channel, for pixels in [0, 1].
        """
        super().__init__()
        self.tower = deepcopy(tower).float()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.requires_grad_(False).train()

    def train(self, mode: bool = True) -> TowerPerceiver:
        """Stay in evaluation mode: the tower is frozen, its dropout too."""
        super().train(False)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``[B,M,h]`` of pixels ``[B,3,H,W]`` in about [-1, 1], of any size."""
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True)
        features: Tensor = self.tower(((pixels + 1) / 2 - self.mean) / self.std).last_hidden_state
        return features
