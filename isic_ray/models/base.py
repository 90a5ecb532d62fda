"""Say what the method asks of a model: draw, decode, encode, judge, rewrite. Knows no Ray.

Shapes: B pictures of H by W pixels, N tokens per picture, K codebook rows of width d, Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from isic_ray.codebook import SafeCodebook


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. Part of a sample's identity: other settings give other samples."""

    guidance: float = 5.0  # scale of classifier-free guidance; 1 switches it off
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0  # 1 keeps every token
    # The share of a picture's tokens that are drawn with guidance (at least one token).
    guidance_until: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for a temperature, top_k or top_p that no sampler can use."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature and top_k must not be negative and top_p must be in (0, 1]: {self}"
            )

    def guided(self, tokens: int) -> int:
        """Return how many of a picture's ``tokens`` are drawn with guidance: the first ones."""
        return 0 if self.guidance == 1 else min(tokens, max(1, round(self.guidance_until * tokens)))


@dataclass(frozen=True)
class ModelSpec:
    """What the driver needs to know of a model without loading it."""

    family: str
    weights_digest: str  # sha256 hex over the weight files
    codebook: Tensor  # [K,d] float32
    normalised: bool
    tokens_depend_on_codebook: bool


class Renderer(torch.nn.Module):
    """Differentiable decoding: tokens ``[B,N]`` and a codebook ``[K,d]`` to pixels ``[B,3,H,W]``.

    Pixels lie in about [-1, 1]. Its parameters are frozen; gradients flow to the codebook only.
    """


class Perceiver(torch.nn.Module):
    """Differentiable seeing: pixels ``[B,3,H,W]`` in about [-1, 1] to features ``[B,M,h]``.

    Frozen, float32.
    """


@runtime_checkable
class SeesPixels(Protocol):
    """A model whose judge looks at pixels through a differentiable encoder.

    ``finetune.loss: features`` needs one.
    """

    def perceiver(self) -> Perceiver:
        """Return what the judge sees, up to where the language model takes over."""
        ...


@runtime_checkable
class Judge(Protocol):
    """What judges pictures and rewrites prompts.

    Either a `UnifiedModel`, or a vision-language model that draws nothing. Subclass it and provide
    ``weights_digest``, `judge` and `rewrite`; `judge_each` has a default.
    """

    # sha256 hex over the weights; a generator's is part of every sample's identity
    weights_digest: str

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """Return P(yes) float32 ``[B,Q]`` for each picture uint8 ``[B,H,W,3]`` and question.

        Read from the next token's logits. A judge that draws nothing takes pictures of any size.
        """
        ...

    def judge_each(
        self, images: np.ndarray, questions: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Return P(yes) for the questions ``questions[i]`` about picture i, in their order.

        The numbers are those of `judge`. This default asks about each question by itself; a judge
        that can read a picture once for all questions about it overrides it.
        """
        answers: dict[tuple[int, str], float] = {}
        for question in dict.fromkeys(q for own in questions for q in own):
            members = [i for i, own in enumerate(questions) if question in own]
            scores = self.judge(images[members], [question])[:, 0].tolist()
            for i, score in zip(members, scores, strict=True):
                answers[i, question] = score
        return [[answers[i, question] for question in own] for i, own in enumerate(questions)]

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Return the greedy answer to each ``instruction.format(prompt=...)``, stripped."""
        ...


@runtime_checkable
class UnifiedModel(Judge, Protocol):
    """A model that draws through an editable codebook, judges pictures and rewrites prompts.

    `isic_ray.models.families.adapter.VisualAdapter` is the half of it that all families share, and
    `isic_ray.testing.UnifiedModelConformance` tests the whole.
    """

    family: str
    codebook: Tensor  # [K,d] float32 master of the base table, on CPU, never changed in place
    normalised: bool  # True when decoding ignores a row's norm (rows are L2-normalised)
    # True: an edit changes what is sampled, so tokens must be drawn again under each table
    tokens_depend_on_codebook: bool
    tokens_per_image: int

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Return visual tokens int32 ``[B,N]``, on CPU. Raises UserError for a prompt too long.

        Row i depends on (prompts[i], seeds[i], settings) alone, never on the batch. Where
        ``tokens_depend_on_codebook``, a fourth argument is the table to draw under (None: the base
        table).
        """
        ...

    def decode(self, tokens: Tensor, codebook: Tensor | None = None) -> np.ndarray:
        """Return pictures uint8 ``[B,H,W,3]`` of tokens ``[B,N]`` under a codebook ``[K,d]``.

        None is the base table. Raises ValueError for tokens or a table that do not fit.
        """
        ...

    def encode(self, images: np.ndarray) -> Tensor:
        """Return visual tokens int32 ``[B,N]`` of pictures uint8 ``[B,H,W,3]``.

        Under the base table. Raises ValueError for pictures of another size.
        """
        ...

    def renderer(self) -> Renderer:
        """Return the decoder as a differentiable function of the codebook, for fine-tuning."""
        ...

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write the checkpoint, with an edit in its table, into a directory.

        The model itself may change with it.
        """
        ...
