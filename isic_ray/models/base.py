"""What the method asks of a model: draw, decode, encode, judge, rewrite. One adapter file per
family. No ray here.
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

    guidance: float = 5.0  # classifier-free guidance scale; 1 switches it off
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0  # 1 keeps every token
    guidance_until: float = (
        1.0  # share of a picture's tokens drawn with guidance (at least one); then without
    )

    def guided(self, tokens: int) -> int:
        """How many of a picture's ``tokens`` are drawn with guidance."""
        return 0 if self.guidance == 1 else min(tokens, max(1, round(self.guidance_until * tokens)))


@dataclass(frozen=True)
class ModelSpec:
    """What the driver needs to know of a model without loading it."""

    family: str
    weights_digest: str  # sha256 hex over the weight files
    codebook: Tensor  # [K,d] float32
    normalised: bool
    tokens_depend_on_codebook: bool


@dataclass(frozen=True)
class Family:
    """What is known of a model family without loading anything; `isic models` prints it.

    Own families are listed in `isic_ray.models.registry`; a package adds its own by the entry point
    group ``isic_ray.families``, each naming one `Family`.
    """

    name: str  # what model.family says
    # "package.module:Class"; the class has from_pretrained(name, dtype, device, trust) and
    # facts(name)
    adapter: str
    model_types: tuple[str, ...]  # the model_type values of config.json that it loads
    checkpoints: str  # published checkpoints, for people
    picture: str  # size of its pictures and tokens in each
    needs: str = ""  # what it needs beyond the checkpoint
    draws: bool = True
    judges: bool = True  # False: give judge.model, which then also rewrites
    normalised: bool = False
    tokens_depend_on_codebook: bool = False


class Renderer(torch.nn.Module):
    """Differentiable decoding: ``forward(tokens [B,N], codebook [K,d]) -> pixels [B,3,H,W]`` in
    about [-1, 1].

    Its own parameters are frozen; gradients flow to ``codebook`` only.
    """


class Perceiver(torch.nn.Module):
    """Differentiable seeing: ``forward(pixels [B,3,H,W] in about [-1, 1]) -> features [B,M,h]``;
    frozen, float32.
    """


@runtime_checkable
class SeesPixels(Protocol):
    """A model whose judge looks at pixels through a differentiable encoder; ``finetune.loss:
    features`` needs one.
    """

    def perceiver(self) -> Perceiver:
        """What the judge sees, up to where the language model takes over."""
        ...


@runtime_checkable
class Judge(Protocol):
    """What judges pictures and rewrites prompts: a `UnifiedModel`, or a vision-language model that
    draws nothing.

    Subclass it for the default of `judge_each`.
    """

    weights_digest: (
        str  # sha256 hex over the weights; a generator's is part of every sample's identity
    )

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """Return P(yes) float32 ``[B,Q]`` for each picture uint8 ``[B,H,W,3]`` and question, read
        from the logits.

        A judge that draws nothing takes pictures of any size.
        """
        ...

    def judge_each(
        self, images: np.ndarray, questions: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Return P(yes) for the questions ``questions[i]`` about picture i, in their order.

        The numbers are those of `judge`. A judge that can read a picture once for all questions
        about it overrides this default, which asks about each question by itself.
        """
        answers: dict[tuple[int, str], float] = {}
        for question in dict.fromkeys(q for own in questions for q in own):
            members = [i for i, own in enumerate(questions) if question in own]
            for i, score in zip(
                members, self.judge(images[members], [question])[:, 0].tolist(), strict=True
            ):
                answers[i, question] = score
        return [[answers[i, question] for question in own] for i, own in enumerate(questions)]

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Return the answers to ``instruction.format(prompt=...)``, greedily decoded."""
        ...


@runtime_checkable
class UnifiedModel(Judge, Protocol):
    """A model that draws through an editable codebook, judges pictures and rewrites prompts."""

    family: str
    codebook: Tensor  # [K,d] float32 master of the base table, on CPU, never changed in place
    normalised: bool  # True when decoding ignores a row's norm (rows are L2-normalised)
    tokens_depend_on_codebook: (
        bool  # True: an edit changes what is sampled, so tokens must be drawn anew
    )
    tokens_per_image: int

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Visual tokens int32 ``[B,N]``, on CPU.

        Row i depends on (prompts[i], seeds[i], settings) alone, never on the batch. Where
        ``tokens_depend_on_codebook`` a fourth argument is the table to draw under (None: the base
        table).
        """
        ...

    def decode(self, tokens: Tensor, codebook: Tensor | None = None) -> np.ndarray:
        """Pictures uint8 ``[B,H,W,3]`` of tokens ``[B,N]`` under ``codebook`` ``[K,d]`` (None:
        the base table).
        """
        ...

    def encode(self, images: np.ndarray) -> Tensor:
        """Visual tokens int32 ``[B,N]`` of pictures uint8 ``[B,H,W,3]`` under the base table."""
        ...

    def renderer(self) -> Renderer:
        """The decoder as a differentiable function of the codebook, for fine-tuning."""
        ...

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write the checkpoint, with an edit in its table, into a directory. The model itself
        may change with it.
        """
        ...
