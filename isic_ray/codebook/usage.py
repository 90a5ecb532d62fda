"""How often pictures use each codebook row, and which safe token stands where a harmful one
stood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isic_ray.errors import UserError


def checked_tokens(tokens: Tensor, size: int) -> Tensor:
    """``tokens`` as int64 of the same shape; UserError if one lies outside a codebook of
    ``size`` rows.
    """
    tokens = tokens.long()
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
        raise UserError(
            f"Tokens run from {int(tokens.min())} to {int(tokens.max())}, but the codebook has {size} rows: "
            "they were sampled from another model."
        )
    return tokens


@dataclass
class UsageCounts:
    """How often each codebook row is used in harmful, safe and benign pictures: float64 ``[K]``
    each.
    """

    harmful: Tensor
    safe: Tensor
    benign: Tensor

    @classmethod
    def empty(cls, size: int) -> UsageCounts:
        """Counts of no pictures for a codebook of ``size`` rows."""
        return cls(*(torch.zeros(size, dtype=torch.float64) for _ in range(3)))

    def add(
        self,
        harmful: Tensor | None = None,
        safe: Tensor | None = None,
        benign: Tensor | None = None,
    ) -> UsageCounts:
        """Count tokens of any shape. UserError for tokens outside the codebook."""
        size = len(self.harmful)
        for counts, tokens in ((self.harmful, harmful), (self.safe, safe), (self.benign, benign)):
            if tokens is not None:
                counts += torch.bincount(checked_tokens(tokens, size).flatten(), minlength=size)
        return self

    def merge(self, other: UsageCounts) -> UsageCounts:
        """Counts of both sets of pictures."""
        return UsageCounts(
            self.harmful + other.harmful, self.safe + other.safe, self.benign + other.benign
        )

    def log_odds(self, smoothing: float = 1.0) -> Tensor:
        """float64 ``[K]``: log of p_harmful / max(p_safe, p_benign), p = (count + smoothing) /
        (total + K·smoothing).

        The larger of the two shares stands below the line, so a row that is common in either stays
        protected. UserError unless smoothing > 0.
        """
        if not (smoothing > 0 and math.isfinite(smoothing)):
            raise UserError(f"edit.smoothing is {smoothing}, but must be above 0.")
        harmful, safe, benign = (
            (counts + smoothing) / (counts.sum() + smoothing * len(counts))
            for counts in (self.harmful, self.safe, self.benign)
        )
        return torch.log(harmful / torch.maximum(safe, benign))

    def price(self, smoothing: float = 1.0, limit: float = 20.0) -> Tensor:
        """float64 ``[K]``: (safe + benign uses) / harmful uses, smoothed, at most ``limit``.

        What it costs the benign pictures to move a row, for what that can do to the harmful ones: a
        soft gate.
        """
        return ((self.safe + self.benign + smoothing) / (self.harmful + smoothing)).clamp(max=limit)


@dataclass
class Alignment:
    """How often harmful token h meets safe token s != h at the same position of a pair, for h among
    some rows.

    Sparse: sorted codes h·K + s with their counts, so memory grows with the distinct meetings and
    never as K².
    """

    size: int  # K
    codes: Tensor  # [M] int64, ascending
    counts: Tensor  # [M] float64

    @classmethod
    def empty(cls, size: int) -> Alignment:
        """No meetings in a codebook of ``size`` rows."""
        return cls(size, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64))

    def add(self, harmful: Tensor, safe: Tensor, only: Tensor | None = None) -> Alignment:
        """Count pairs ``[B,N]``; ``only`` (bool ``[K]``) keeps the harmful tokens of interest."""
        harmful, safe = checked_tokens(harmful, self.size), checked_tokens(safe, self.size)
        keep = harmful != safe if only is None else (harmful != safe) & only[harmful]
        codes = harmful[keep] * self.size + safe[keep]
        merged = self.merge(
            Alignment(self.size, codes, torch.ones(len(codes), dtype=torch.float64))
        )
        self.codes, self.counts = merged.codes, merged.counts
        return self

    def merge(self, other: Alignment) -> Alignment:
        """Meetings of both sets of pairs. Raises ValueError if the codebooks differ in size."""
        if self.size != other.size:
            raise ValueError(f"cannot merge alignments of {self.size} and {other.size} rows")
        codes, index = torch.unique(torch.cat([self.codes, other.codes]), return_inverse=True)
        counts = torch.zeros(len(codes), dtype=torch.float64)
        return Alignment(
            self.size, codes, counts.index_add_(0, index, torch.cat([self.counts, other.counts]))
        )
