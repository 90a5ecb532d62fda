"""Train the picture tokenizer, and turn training scenes into tokens with it.

Shapes: B pictures of H x W pixels, N latents or tokens of a batch, d their width, P scenes of a
pool, 36 tokens per picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from isic_ray.pictogram.draw import draw
from isic_ray.pictogram.scene import Scene
from isic_ray.pictogram.training.stages import Stage, to_pixels, training_scene


class VQStage(Stage):
    """Encoder, codebook and decoder learn to draw a picture again from its tokens."""

    name = "vq"
    learning_rate = 2e-3

    def __init__(self, vqmodel: Any, *, steps: int = 2400) -> None:
        self.module = vqmodel
        self.steps, self.batch_size = steps, 12
        # Steps without quantisation, until the latents mean something.
        self.warmup = min(300, steps // 4)
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
            # Also after a resume: no code counts as dead before it was watched.
            self._last_used.fill_(step)
        if step == self.warmup:
            self._seed_codebook(flat_z.detach())
        commitment = torch.zeros(())
        quantised = z
        if step >= self.warmup:
            flat_q, commitment = self._quantise(flat_z, step)
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

    def report(self) -> dict[str, float]:
        return self._figures

    def _quantise(self, latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the code nearest by cosine to each latent ``[N,d]``, and the commitment loss.

        Gradients pass through the choice (straight-through): Hugging Face's own quantiser cannot
        train.
        """
        codes = F.normalize(self._codebook(), dim=1)
        chosen = (latents.detach() @ codes.detach().T).argmax(1)
        self._last_used[chosen] = step
        nearest = codes[chosen]
        towards_codes = F.mse_loss(latents, nearest.detach())
        commitment = F.mse_loss(nearest, latents.detach()) + 0.25 * towards_codes
        return latents + (nearest - latents).detach(), commitment

    @torch.no_grad()
    def _revive_dead_codes(self, step: int) -> None:
        """Move codes unused for 100 steps onto random latents, so the whole table stays in use."""
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
        generator = torch.Generator().manual_seed(0)
        weight.copy_(latents[torch.randint(len(latents), (len(weight),), generator=generator)])
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(weight.data, src=0)

    def _codebook(self) -> Tensor:
        vq: Any = self.module
        weight: Tensor = vq.quantize.embedding.weight
        return weight


@dataclass(frozen=True)
class Pool:
    """Training scenes with their visual tokens and, for the first of them, decoded pictures."""

    scenes: list[Scene]
    tokens: Tensor  # [P,36] int64
    decoded: np.ndarray  # uint8 [D,H,W,3] of the first D scenes


def build_pool(vqmodel: Any, cache: Path, *, size: int = 40_000, decoded: int = 2_000) -> Pool:
    """Draw and tokenise ``size`` training scenes, and decode the first ``decoded`` of them.

    Tokens and pictures are cached in the safetensors file ``cache``.
    """
    scenes = [training_scene(Random(f"scene/{i}")) for i in range(size)]
    if cache.exists():
        saved = load_file(cache)
        return Pool(scenes, saved["tokens"].long(), saved["decoded"].numpy())
    tokens, pictures = [], []
    for start in range(0, size, 100):
        images = np.stack(
            [np.asarray(draw(scenes[i], Random(f"layout/{i}"))) for i in range(start, start + 100)]
        )
        with torch.inference_mode():
            codes = cosine_encode(vqmodel, to_pixels(images))
            tokens.append(codes)
            if start < decoded:
                rendered = vqmodel.decode(codes).permute(0, 2, 3, 1)
                pictures.append(((rendered + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    every_token, every_picture = torch.cat(tokens), torch.cat(pictures)
    save_file({"tokens": every_token.to(torch.int32), "decoded": every_picture}, cache)
    return Pool(scenes, every_token, every_picture.numpy())


def cosine_encode(vqmodel: Any, pixels: Tensor) -> Tensor:
    """Return the tokens ``[B,36]`` of pixels ``[B,3,H,W]``.

    A token is the nearest code by cosine, as in the original Janus.
    """
    latents = F.normalize(vqmodel.quant_conv(vqmodel.encoder(pixels)), dim=1).permute(0, 2, 3, 1)
    codes = F.normalize(vqmodel.quantize.embedding.weight, dim=1)
    return (latents @ codes.T).argmax(-1).flatten(1)
