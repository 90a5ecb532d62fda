"""Share what adapters have in common: one file per family beside this one holds the rest.

`VisualAdapter` draws, decodes and encodes; the functions below it serve the families' own methods.
Shapes: B pictures of H by W pixels, h by w positions each, N tokens per picture, K codebook rows of
width d.
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

# Pictures decoded, encoded or judged together. A multiple of 4 keeps convolutions on a CPU to one
# kernel.
PICTURES = 8


class Painter(Renderer):
    """A `Renderer` that shares its modules with a model; always in evaluation mode.

    Subclass it and provide ``forward(tokens [B,N], codebook [K,d]) -> pixels [B,3,H,W]``.
    """

    def train(self, mode: bool = True) -> Painter:
        """Stay in evaluation mode: the decoder is frozen, its dropout too."""
        super().train(False)
        return self

    def detached(self) -> Painter:
        """Return a frozen float32 copy that shares nothing with the model."""
        return deepcopy(self).float().requires_grad_(False).train()


class VisualAdapter(Judge):
    """The half of a `UnifiedModel` that every family has.

    A family's adapter subclasses it and provides

    - ``family``, and the other class attributes where their defaults are not true of it;
    - the class method ``from_pretrained(name, dtype, device, trust_remote_code)``, which returns a
      frozen model with all the attributes below;
    - `sample`, as `UnifiedModel` describes it, `latents` and `export`;
    - `judge` and `rewrite`, unless it draws only;
    - `files` and `read_codebook`, where its checkpoints are not laid out as transformers' are.
    """

    family: ClassVar[str]  # its name in `isic_ray.models.registry`
    normalised: ClassVar[bool] = False
    tokens_depend_on_codebook: ClassVar[bool] = False
    codebook_key: ClassVar[str] = "vqmodel.quantize.embedding.weight"  # how the table's name ends

    model: Any  # what SafeCodebook.apply takes, and what holds the weights
    codebook: Tensor  # [K,d] float32 on CPU: the base table at the precision of the file
    weights_digest: str
    tokens_per_image: int
    height: int  # of its pictures, in pixels
    width: int
    painter: Painter  # its decoder

    @classmethod
    def spec(cls, name: str) -> ModelSpec:
        """Return what the driver needs to know, from the files of checkpoint ``name`` alone.

        Raises UserError when they are not sound, or hold no codebook.
        """
        directory = resolve_checkpoint(name)
        table = cls.read_codebook(directory)
        digest = digest_files(cls.files(directory))
        return ModelSpec(cls.family, digest, table, cls.normalised, cls.tokens_depend_on_codebook)

    @classmethod
    def files(cls, directory: Path) -> list[Path]:
        """Return the weight files of a checkpoint, in the order in which they are digested."""
        return weight_files(directory)

    @classmethod
    def read_codebook(cls, directory: Path) -> Tensor:
        """Return the codebook float32 ``[K,d]`` from the files. Raises UserError without one."""
        return read_table(directory, cls.files(directory), cls.codebook_key)

    @property
    def device(self) -> torch.device:
        """Return where pictures are drawn."""
        return next(self.painter.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type that pictures are drawn in."""
        return next(self.painter.parameters()).dtype

    @torch.no_grad()
    def decode(self, tokens: Tensor, codebook: Tensor | None = None) -> np.ndarray:
        """Return pictures uint8 ``[B,H,W,3]`` of tokens ``[B,N]`` under a codebook ``[K,d]``.

        None is the base table. Raises ValueError for tokens or a codebook of another shape, or
        tokens outside the table.
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
        """Return tokens int32 ``[B,N]`` of pictures uint8 ``[B,H,W,3]`` under the base table.

        Raises ValueError for pictures of another size.
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
        """Return tokens int64 ``[B,h,w]`` of one block of pictures uint8 ``[B,H,W,3]``."""
        latents = self.latents(images).float()
        return nearest(latents, self.codebook.to(latents.device), self.normalised)

    def latents(self, images: np.ndarray) -> Tensor:
        """Return what the encoder makes of one block of pictures: ``[B,h,w,d]``, unquantised."""
        raise NotImplementedError

    def renderer(self) -> Renderer:
        """Return a float32 copy of the decoder, differentiable in the codebook."""
        return self.painter.detached()

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """Refuse, as a family that draws only. Raises UserError."""
        raise UserError(
            f"a {self.family} model cannot judge pictures; set judge.model to one that can"
        )

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Refuse, as a family that draws only. Raises UserError."""
        raise UserError(
            f"a {self.family} model cannot rewrite prompts; set judge.model to one that can"
        )

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write a checkpoint with the edit in its table, in the layout it was loaded from."""
        raise NotImplementedError


def picture_blocks(count: int, size: int = PICTURES) -> Iterator[np.ndarray]:
    """Yield row indices in blocks of exactly ``size``; the last row fills up the last block."""
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


def pixels_of(images: np.ndarray) -> Tensor:
    """Return pixels float32 ``[B,3,H,W]`` in [-1, 1] of pictures uint8 ``[B,H,W,3]``."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def nearest(latents: Tensor, table: Tensor, normalised: bool) -> Tensor:
    """Return the row int64 ``[...]`` of ``table`` ``[K,d]`` nearest to each latent ``[...,d]``.

    By angle if rows are normalised, else by distance.
    """
    if normalised:
        return (F.normalize(latents, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)
    # |z - e|² without |z|², which is the same for all rows
    return (table.square().sum(1) - 2 * latents @ table.T).argmin(-1)


def rows_as_map(tokens: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Return the rows of tokens ``[B,N]`` as a feature map ``[B,d,height,width]``."""
    rows = F.embedding(tokens.long(), table)
    return rows.view(len(tokens), height, width, -1).permute(0, 3, 1, 2).contiguous()


def check_prompt_lengths(
    prompts: Sequence[str], given: Sequence[Sequence[int] | Tensor], room: int
) -> None:
    """Raise UserError for the first prompt whose tokens ``given[i]`` are more than ``room``."""
    for prompt, tokens in zip(prompts, given, strict=True):
        if len(tokens) > room:
            raise UserError(
                f"prompt {prompt[:60]!r}… has {len(tokens)} tokens; the model has room for {room}"
            )


def export_stock(model: Any, processor: Any, artifact: SafeCodebook, directory: Path) -> None:
    """Write a checkpoint for stock transformers; ``model`` then holds the edited table too."""
    artifact.apply(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
