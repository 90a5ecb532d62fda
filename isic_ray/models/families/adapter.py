"""What adapters share: pictures in fixed blocks, the nearest row, reading the codebook, saying what
is missing.

`VisualAdapter` draws, decodes and encodes. Shapes: B pictures, N tokens each, K rows of width d, H
by W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.codebook import SafeCodebook
from isic_ray.errors import UserError
from isic_ray.models.base import Judge, ModelSpec, Renderer
from isic_ray.models.checkpoints import digest_files, read_table, weight_files
from isic_ray.models.fetching import resolve_checkpoint

# pictures decoded, encoded or judged together; a multiple of 4 keeps to one convolution kernel on
# CPU
PICTURES = 8


class Painter(Renderer):
    """A `Renderer` that shares its modules with a model; always in evaluation mode."""

    def train(self, mode: bool = True) -> Painter:
        """Stay in evaluation mode: the decoder is frozen, its dropout too."""
        super().train(False)
        return self

    def detached(self) -> Painter:
        """A frozen float32 copy, with modules of its own."""
        return deepcopy(self).float().requires_grad_(False).train()


class VisualAdapter(Judge):
    """The half of a `UnifiedModel` that every family has; subclasses set the attributes and fill
    in the methods.
    """

    family: ClassVar[str]
    normalised: ClassVar[bool] = False
    tokens_depend_on_codebook: ClassVar[bool] = False
    codebook_key: ClassVar[str] = "vqmodel.quantize.embedding.weight"

    model: Any  # what SafeCodebook.apply takes, and what holds the weights
    codebook: Tensor
    weights_digest: str
    tokens_per_image: int
    height: int  # of its pictures, in pixels
    width: int
    painter: Painter

    @classmethod
    def facts(cls, name: str) -> ModelSpec:
        """What the driver needs, from the files alone. Raises UserError when there is no
        codebook in them.
        """
        directory = resolve_checkpoint(name)
        files = cls.files(directory)
        table = read_table(directory, files, cls.codebook_key)
        return ModelSpec(
            cls.family, digest_files(files), table, cls.normalised, cls.tokens_depend_on_codebook
        )

    @classmethod
    def files(cls, directory: Path) -> list[Path]:
        """The weight files of a checkpoint, in the order in which they are digested."""
        return weight_files(directory)

    @property
    def device(self) -> torch.device:
        """Where pictures are drawn."""
        return next(self.painter.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type that pictures are drawn in."""
        return next(self.painter.parameters()).dtype

    @torch.no_grad()
    def decode(self, tokens: Tensor, codebook: Tensor | None = None) -> np.ndarray:
        """Pictures uint8 ``[B,H,W,3]`` of ``[B,N]`` under a table ``[K,d]`` (None: the base table).

        Raises ValueError for tokens or a codebook of another shape, or tokens outside the table.
        """
        table = self.codebook if codebook is None else codebook
        if table.shape != self.codebook.shape:
            raise ValueError(
                f"codebook is {tuple(table.shape)}; this model's is {tuple(self.codebook.shape)}"
            )
        if tokens.ndim != 2 or tokens.shape[1] != self.tokens_per_image:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}, expected [B,{self.tokens_per_image}]"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(table):
            raise ValueError(f"tokens must be in [0, {len(table)})")
        table = table.to(self.device, self.dtype)
        pictures = np.empty((len(tokens), self.height, self.width, 3), dtype=np.uint8)
        for rows in picture_blocks(len(tokens)):
            pixels = self.painter(tokens[rows].to(self.device), table)
            levels = ((pixels.float() + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)
            pictures[rows] = levels.permute(0, 2, 3, 1).cpu().numpy()
        return pictures

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        """Tokens int32 ``[B,N]`` of pictures uint8 ``[B,H,W,3]`` under the base table.
        ValueError for other sizes.
        """
        if images.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"pictures are {images.shape}, expected [B,{self.height},{self.width},3]"
            )
        tokens = torch.empty(len(images), self.tokens_per_image, dtype=torch.int32)
        for rows in picture_blocks(len(images)):
            tokens[rows] = self.read(images[rows]).flatten(1).to("cpu", torch.int32)
        return tokens

    def read(self, images: np.ndarray) -> Tensor:
        """Tokens int64 ``[B,h,w]`` of one block of pictures."""
        latents = self.latents(images).float()
        return nearest(latents, self.codebook.to(latents.device), self.normalised)

    def latents(self, images: np.ndarray) -> Tensor:
        """What the encoder makes of one block of pictures: ``[B,h,w,d]`` before quantisation."""
        raise NotImplementedError

    def renderer(self) -> Renderer:
        """A float32 copy of the decoder, differentiable in the codebook."""
        return self.painter.detached()

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """Refuse: this family draws only. Raises UserError."""
        raise UserError(
            f"a {self.family} model cannot judge pictures; set judge.model to one that can"
        )

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Refuse: this family draws only. Raises UserError."""
        raise UserError(
            f"a {self.family} model cannot rewrite prompts; set judge.model to one that can"
        )

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write a checkpoint with the edit in its table into ``directory``, in the layout it was
        loaded from.
        """
        raise NotImplementedError


def picture_blocks(count: int, size: int = PICTURES) -> Iterator[np.ndarray]:
    """Row indices in blocks of exactly ``size``; the last row fills up the rest."""
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


def nearest(latents: Tensor, table: Tensor, normalised: bool) -> Tensor:
    """The row int64 ``[...]`` nearest to each latent ``[...,d]``: by angle if rows are
    normalised, else by distance.
    """
    if normalised:
        return (F.normalize(latents, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)
    # |z - e|² without |z|², which is the same for all rows
    return (table.square().sum(1) - 2 * latents @ table.T).argmin(-1)


def rows_as_map(tokens: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Codebook rows as a feature map ``[B,d,height,width]`` of tokens ``[B,N]``."""
    rows = F.embedding(tokens.long(), table)
    return rows.view(len(tokens), height, width, -1).permute(0, 3, 1, 2).contiguous()
