"""A model family of your own, in your own package: this file, and two lines in your pyproject.toml:

    [project.entry-points."isic_ray.families"]
    stripes = "own_family:FAMILY"

`isic models` then lists it, and `isic run --set model.name=DIR` takes checkpoints whose config.json
says ``"model_type": "stripes"``. This one draws N stripes, each in the colour of one codebook row
[K,3]; it has no judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from isic_ray.codebook import SafeCodebook
from isic_ray.models.base import Family, SamplingSettings
from isic_ray.models.families.adapter import Painter, VisualAdapter
from isic_ray.models.fetching import resolve_checkpoint

FAMILY = Family(
    "stripes", "own_family:StripesModel", ("stripes",), "none", "4 x 8, 8 tokens", judges=False
)


class StripesPainter(Painter):
    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        return codebook[tokens.long()].mT[:, :, None].expand(-1, -1, 4, -1)  # [B,3,4,N]


class StripesModel(VisualAdapter):
    family, codebook_key = "stripes", "codebook"
    tokens_per_image, height, width = 8, 4, 8
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, directory: Path) -> None:
        facts = self.facts(str(directory))  # reads the codebook, and refuses an unsound one
        self.codebook, self.weights_digest, self.painter = (
            facts.codebook,
            facts.weights_digest,
            StripesPainter(),
        )

    @classmethod
    def from_pretrained(
        cls, name: str, dtype: str, device: str, trust_remote_code: bool
    ) -> StripesModel:
        return cls(resolve_checkpoint(name))

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        # A row's own generator and nothing else, so that samples do not depend on batches or
        # workers.
        drawn = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            noise = torch.randn(
                8, len(self.codebook), generator=torch.Generator().manual_seed(seed)
            )
            stripes = (noise * settings.temperature).argmax(1) + int(settings.guidance) * len(
                prompt
            )
            drawn.append(
                stripes % len(self.codebook)
            )  # a real model would guide and weigh its logits
        return torch.stack(drawn).int()

    def latents(self, images: np.ndarray) -> Tensor:
        return (
            torch.from_numpy(images[:, :1]).float() / 127.5 - 1
        )  # [B,1,8,3]: the nearest row is found for us

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        save_file({"codebook": artifact.apply_to(self.codebook)}, directory / "model.safetensors")
        (directory / "config.json").write_text('{"model_type": "stripes"}')
