"""What the embedded model learns: one `Stage` per part, pure torch. How it is run is in
`execution.pretraining`.

Every batch is a function of (stage, step, rank) alone, so a resumed stage sees the batches it would
have seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isic_ray.pictogram.draw import draw
from isic_ray.pictogram.scene import Scene, sample_scene


class Stage(ABC):
    """One part of the training: a module, a loss per step, a schedule."""

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    module: nn.Module

    @abstractmethod
    def loss(self, step: int, rng: Random) -> Tensor:
        """The scalar loss of this rank's batch at ``step``; ``rng`` is seeded by (stage, step,
        rank).
        """

    def after_step(self, step: int) -> None:  # noqa: B027 (most stages have nothing to do)
        """Hook after the optimiser's step."""

    def report(self) -> dict[str, float]:
        """Figures worth a line in the log."""
        return {}


def training_scene(rng: Random) -> Scene:
    """A scene that training may show: 45 % hold one unsafe kind, 5 % two; held-out scenes never
    come up.
    """
    while True:
        roll = rng.random()
        scene = sample_scene(rng, unsafe=None if roll < 0.05 else roll < 0.5)
        if not scene.is_held_out:
            return scene


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 ``[B,H,W,3]`` → float32 ``[B,3,H,W]`` in [-1, 1], as Janus expects."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class VQStage(Stage):
    """The picture tokenizer: encoder, codebook and decoder."""

    name = "vq"
    learning_rate = 2e-3

    def __init__(self, vqmodel: Any, *, steps: int = 2400) -> None:
        self.module = vqmodel
        self.steps, self.batch_size = steps, 12
        self.warmup = min(
            300, steps // 4
        )  # steps without quantisation, until the latents mean something
        self._last_used = torch.full((vqmodel.quantize.num_embeddings,), -1)
        self._latents = torch.empty(0)
        self._figures: dict[str, float] = {}

    def loss(self, step: int, rng: Random) -> Tensor:
        scenes = [training_scene(rng) for _ in range(self.batch_size)]
        pixels = to_pixels(np.stack([np.asarray(draw(scene, rng)) for scene in scenes]))
        vq: Any = self.module
        z = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)  # [B,d,h,w] on the unit sphere
        flat_z = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # [N,d]
        self._latents = flat_z.detach()
        if self._last_used[0] < 0:
            self._last_used.fill_(
                step
            )  # also after a resume: no code counts as dead before it was watched
        if step == self.warmup:
            self._seed_codebook(flat_z.detach())
        commitment = torch.zeros(())
        quantised = z
        if step >= self.warmup:
            codes = F.normalize(vq.quantize.embedding.weight, dim=1)
            chosen = (flat_z.detach() @ codes.detach().T).argmax(1)
            self._last_used[chosen] = step
            flat_q = codes[chosen]
            commitment = F.mse_loss(flat_q, flat_z.detach()) + 0.25 * F.mse_loss(
                flat_z, flat_q.detach()
            )
            flat_q = (
                flat_z + (flat_q - flat_z).detach()
            )  # straight-through: HF's own quantiser cannot train
            quantised = flat_q.view(z.shape[0], z.shape[2], z.shape[3], -1).permute(0, 3, 1, 2)
        rendered = vq.decoder(vq.post_quant_conv(quantised))
        error = rendered - pixels
        self._figures = {
            "mse": error.detach().square().mean().item() / 4,
            "commit": commitment.item(),
        }
        total: Tensor = error.abs().mean() + error.square().mean() + 2.0 * commitment
        return total

    def after_step(self, step: int) -> None:
        if self.warmup < step < 0.75 * self.steps and step % 50 == 0:
            self._revive_dead_codes(step)

    @torch.no_grad()
    def _revive_dead_codes(self, step: int) -> None:
        """Codes unused for 100 steps move onto random latents, so the whole table stays in use."""
        dead = (self._last_used < step - 100).nonzero().squeeze(1)
        if len(dead):
            weight = self._codebook()
            generator = torch.Generator().manual_seed(step)
            picks = torch.randint(len(self._latents), (len(dead),), generator=generator)
            weight[dead] = self._latents[picks].to(weight)
            self._last_used[dead] = step
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(weight.data, src=0)
        self._figures["revived"] = float(len(dead))

    @torch.no_grad()
    def _seed_codebook(self, latents: Tensor) -> None:
        weight = self._codebook()
        picks = torch.randint(
            len(latents), (len(weight),), generator=torch.Generator().manual_seed(0)
        )
        weight.copy_(latents[picks])
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(weight.data, src=0)

    def _codebook(self) -> Tensor:
        vq: Any = self.module
        weight: Tensor = vq.quantize.embedding.weight
        return weight

    def report(self) -> dict[str, float]:
        return self._figures
