"""Draw pictures with any network, from prompts that are embeddings: all families but Janus.

The contract is that of `isic_ray.models.decoding.sampler`: rows run in blocks of one size and at
widths that depend on their own prompt alone, each token takes one uniform from the row's own seed,
and tokens are found by inverse CDF.

Shapes: B samples, R rows in flight (twice B under guidance), L positions of a prompt, h hidden
size, K rows of the codebook, N positions of a picture, D tokens per position (more than one for
residual codebooks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.models.base import SamplingSettings
from isic_ray.models.decoding.blocks import blocks
from isic_ray.models.decoding.choice import choose, guided, row_uniforms
from isic_ray.models.decoding.network import Network
from isic_ray.models.decoding.sampler import BLOCK

# (hidden [R,h], uniforms [B,D], settings) -> (the next position's tokens [B,D], what to feed [B,h])
Step = Callable[[Tensor, Tensor, SamplingSettings], tuple[Tensor, Tensor]]


class PictureSampler:
    """Draws the tokens of pictures, from prompts that are embeddings."""

    def __init__(
        self,
        network: Network,
        step: Step,
        *,
        positions: int,
        depth: int = 1,
        row: int = 0,
        separator: Tensor | None = None,
        width: int = 0,
    ) -> None:
        """Set up drawing of pictures of ``positions`` positions with ``depth`` tokens each.

        ``step`` turns hidden states into tokens; see `one_token`. With ``row`` > 0, ``separator``
        ``[h]`` is fed after every ``row`` positions. ``width`` is the padded width of prompts; 0
        pads each to 16 or the next power of two.
        """
        self.network, self.step, self.positions, self.depth = network, step, positions, depth
        self.row, self.separator, self.width = row, separator, width

    @torch.inference_mode()
    def draw(
        self,
        conditional: Sequence[Tensor],
        unconditional: Sequence[Tensor],
        seeds: Sequence[int],
        settings: SamplingSettings,
    ) -> Tensor:
        """Return tokens int32 ``[B,N*D]`` on CPU, for prompts with and without their condition.

        Prompts are embeddings ``[L,h]``. Row i depends on its own two prompts and seed, and on the
        settings, alone. Raises ValueError when the three differ in number.
        """
        if not len(conditional) == len(unconditional) == len(seeds):
            raise ValueError(
                f"{len(conditional)} prompts, {len(unconditional)} without condition, "
                f"{len(seeds)} seeds"
            )
        result = torch.empty(len(seeds), self.positions * self.depth, dtype=torch.int32)
        lengths = [
            max(len(given), len(free))
            for given, free in zip(conditional, unconditional, strict=True)
        ]
        for width, rows in blocks(lengths, BLOCK):
            prompts = [conditional[i] for i in rows]
            if settings.guidance != 1:
                prompts += [unconditional[i] for i in rows]
            tokens = self._draw_block(
                prompts, [seeds[i] for i in rows], self.width or width, settings
            )
            result[torch.tensor(rows)] = tokens.flatten(1).to("cpu", torch.int32)
        return result

    def _draw_block(
        self, prompts: list[Tensor], seeds: list[int], width: int, settings: SamplingSettings
    ) -> Tensor:
        """Return tokens int64 ``[B,N,D]`` of one block; prompts without condition come last."""
        device = prompts[0].device
        guided_positions = settings.guided(self.positions)
        uniforms = row_uniforms(seeds, self.positions * self.depth).to(device)
        uniforms = uniforms.view(len(seeds), self.positions, self.depth)
        tokens = torch.empty(uniforms.shape, dtype=torch.long, device=device)
        pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        x = torch.stack([F.pad(prompt, (0, 0, width - len(prompt), 0)) for prompt in prompts])
        separators = self.positions // self.row if self.row else 0
        reading = self.network.start(pads, width + self.positions + separators)
        hidden = reading.extend(x)
        for position in range(self.positions):
            tokens[:, position], fed = self.step(hidden, uniforms[:, position], settings)
            if position + 1 == self.positions:
                break
            if position + 1 == guided_positions:
                reading, settings = reading.first(len(seeds)), replace(settings, guidance=1.0)
            hidden = reading.step(fed.repeat(2 if position + 1 < guided_positions else 1, 1))
            if self.separator is not None and (position + 1) % self.row == 0:
                hidden = reading.step(self.separator.expand_as(hidden))
        return tokens


def one_token(table: Tensor, head: Callable[[Tensor], Tensor]) -> Step:
    """Return the step of families with one token per position.

    ``head`` gives logits ``[R,K]`` of hidden states ``[R,h]``; rows of ``table`` ``[K,h]`` are fed.
    """

    def step(hidden: Tensor, uniforms: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
        chosen = choose(guided(head(hidden), settings.guidance), uniforms, settings)
        return chosen[:, None], F.embedding(chosen, table)

    return step
