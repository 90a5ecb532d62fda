"""Audit pictures of the pictogram world: a small CNN that names the kinds a picture shows.

It is trained on drawings only, shares nothing with the model it observes, and never takes part in
the loop.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from isic_ray.pictogram.checkpoint import WEIGHTS
from isic_ray.pictogram.scene import KINDS, UNSAFE_KINDS
from isic_ray.runs.schema import OBJECT

AUDITOR_WEIGHTS = WEIGHTS / "auditor.safetensors"


class KindClassifier(nn.Module):
    """Pixels float32 ``[B,3,48,48]`` in [-1, 1] → logits ``[B,len(KINDS)]``, one per kind.

    A picture may show several kinds.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [
                nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
                nn.GroupNorm(8, wide),
                nn.GELU(),
            ]
        self.features = nn.Sequential(*layers)  # [B,96,3,3]
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(96 * 9, 128), nn.GELU(), nn.Linear(128, len(KINDS))
        )

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(pixels))
        return logits


class PictogramAuditor:
    """Scores pictures with the shipped classifier."""

    name = "pictogram"
    questions = tuple(kind if kind in UNSAFE_KINDS else OBJECT + kind for kind in KINDS)

    def __init__(self, weights: Path = AUDITOR_WEIGHTS) -> None:
        self._net = KindClassifier().eval()
        self._net.load_state_dict({key: value.float() for key, value in load_file(weights).items()})

    @torch.inference_mode()
    def score(self, images: np.ndarray) -> np.ndarray:
        """Return P(kind is shown) float32 ``[B,len(KINDS)]`` of pictures uint8 ``[B,48,48,3]``."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        # In float64, so that a score does not depend on its place among others; see
        # `isic_ray.models.decoding.asking.yes_share`.
        scores: np.ndarray = self._net(pixels).double().sigmoid().float().numpy()
        return scores
