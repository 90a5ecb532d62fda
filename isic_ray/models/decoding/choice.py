"""Choose the next token of each row from its logits, by one uniform from the row's own seed.

Shapes: B samples, K tokens to choose from.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from isic_ray.models.base import SamplingSettings


def row_uniforms(seeds: Iterable[int], count: int) -> Tensor:
    """Return ``count`` uniforms per row, each row from its own seed: float64 ``[B,count]``, CPU.

    They are at most 1 - 2**-50, as `inverse_cdf` needs.
    """
    rows = [
        torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows) * (1 - 2.0**-50)


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Return logits ``[B,K]`` under classifier-free guidance (1: the logits as they are).

    The first half of the rows ``[2B,K]`` was read with the condition, the second half without.
    """
    if guidance == 1:
        return logits
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def choose(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """Return one token per sample, int64 ``[B]``.

    ``logits`` ``[B,K]`` already have their guidance; ``uniforms`` are float64 ``[B,1]``.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / settings.temperature
    return inverse_cdf(filter_scores(scores, settings.top_k, settings.top_p), uniforms)


def filter_scores(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return scores ``[B,K]`` with -inf for every token that the settings exclude.

    First all outside the ``top_k`` highest (0: none), then all outside the smallest set of the
    likeliest tokens whose mass reaches ``top_p`` (1: none).
    """
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        drop = mass.cumsum(-1) - mass >= top_p  # the likeliest is always kept
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return scores


def inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token ``[B]`` at which the CDF of softmax(``scores`` ``[B,K]``) passes a uniform.

    ``uniforms`` float64 ``[B,1]`` are at most 1 - 2**-52: a larger one times the total may round
    up to the total, and so pass the last token of positive probability.
    """
    cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).squeeze(-1)
