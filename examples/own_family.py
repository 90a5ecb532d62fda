"""A model family of your own, in your own package: this file, and two lines in your pyproject.toml:

    [project.entry-points."isic_ray.families"]
    stripes = "own_family:FAMILY"

`isic models` then lists it, and `isic run --set model.name=DIR` takes checkpoints whose config.json
says ``"model_type": "stripes"``. It draws 8 stripes, each in the colour of one codebook row [K,3];
it has no judge.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from isic_ray.codebook import SafeCodebook
from isic_ray.models.base import SamplingSettings
from isic_ray.models.catalogue import Family
from isic_ray.models.families.adapter import Painter, VisualAdapter

CLASS = "own_family:StripesModel"
FAMILY = Family("stripes", CLASS, ("stripes",), "none", "4 x 8, 8 tokens", judges=False)


class StripesPainter(Painter):
    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        return codebook[tokens.long()].mT[:, :, None].expand(-1, -1, 4, -1)  # [B,3,4,N]


class StripesModel(VisualAdapter):
    family, codebook_key = "stripes", "codebook"
    tokens_per_image, height, width = 8, 4, 8
    device, dtype = torch.device("cpu"), torch.float32

    @classmethod
    def from_pretrained(cls, name: str, dtype: str, device: str, trust: bool) -> "StripesModel":
        model, spec = cls(), cls.spec(name)  # reads the codebook, and refuses an unsound one
        model.codebook, model.weights_digest = spec.codebook, spec.weights_digest
        model.painter = StripesPainter()
        return model

    def sample(self, prompts: list[str], seeds: list[int], settings: SamplingSettings) -> Tensor:
        rows = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            # A row's own generator and nothing else, so that samples do not depend on the batch.
            generator = torch.Generator().manual_seed(seed)
            noise = settings.temperature * torch.randn(8, len(self.codebook), generator=generator)
            # A real model would guide and weigh its logits.
            rows.append(noise.argmax(1) + int(settings.guidance) * len(prompt))
        return (torch.stack(rows) % len(self.codebook)).int()

    def latents(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images[:, :1]).float() / 127.5 - 1  # [B,1,8,3]

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        save_file({"codebook": artifact.apply_to(self.codebook)}, directory / "model.safetensors")
        (directory / "config.json").write_text('{"model_type": "stripes"}')
