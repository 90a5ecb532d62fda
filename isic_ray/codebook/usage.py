"""Count which tokens the pictures use, and which safe token stands where a harmful one stood.

`UsageCounts` says how often each codebook row is used in harmful, safe and benign pictures: the
evidence from which an edit selects rows. `Alignment` says which safe token most often takes the
place of a harmful one: where `transport` moves a row to. Both are exact counts (float64 holds every
integer up to 2**53) that add batch by batch and merge, so pictures can be counted in parts and in
any order.

Shapes: K rows of the codebook, B pairs in a batch, N tokens per picture, M distinct meetings of two
tokens. Tokens are integers from 0 to K - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isic_ray.errors import UserError


def checked_tokens(tokens: Tensor, size: int) -> Tensor:
    """Return ``tokens`` as int64 of the same shape.

    Raises UserError if a token lies outside a codebook of ``size`` rows.
    """
    tokens = tokens.long()
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
        raise UserError(
            f"Tokens run from {int(tokens.min())} to {int(tokens.max())}, but the codebook has "
            f"{size} rows: they were sampled from another model."
        )
    return tokens


@dataclass
class UsageCounts:
    """How often harmful, safe and benign pictures use each codebook row."""

    harmful: Tensor  # [K] float64
    safe: Tensor  # [K] float64
    benign: Tensor  # [K] float64

    @classmethod
    def empty(cls, size: int) -> UsageCounts:
        """Return the counts of no pictures for a codebook of ``size`` rows."""
        return cls(*(torch.zeros(size, dtype=torch.float64) for _ in range(3)))

    def add(
        self,
        harmful: Tensor | None = None,
        safe: Tensor | None = None,
        benign: Tensor | None = None,
    ) -> UsageCounts:
        """Count tokens of any shape, in place. Raises UserError for tokens outside the codebook."""
        size = len(self.harmful)
        for counts, tokens in ((self.harmful, harmful), (self.safe, safe), (self.benign, benign)):
            if tokens is not None:
                counts += torch.bincount(checked_tokens(tokens, size).flatten(), minlength=size)
        return self

    def merge(self, other: UsageCounts) -> UsageCounts:
        """Return the counts of both sets of pictures."""
        return UsageCounts(
            self.harmful + other.harmful, self.safe + other.safe, self.benign + other.benign
        )

    def log_odds(self, smoothing: float = 1.0) -> Tensor:
        """Return log(p_harmful / max(p_safe, p_benign)), float64 ``[K]``.

        p = (count + smoothing) / (total + K·smoothing). The larger of the two shares is the
        divisor, so a row that is common in either set stays protected. Raises UserError unless
        smoothing > 0.
        """
        if not (smoothing > 0 and math.isfinite(smoothing)):
            raise UserError(f"edit.smoothing is {smoothing}, but must be above 0.")
        harmful, safe, benign = (
            (counts + smoothing) / (counts.sum() + smoothing * len(counts))
            for counts in (self.harmful, self.safe, self.benign)
        )
        return torch.log(harmful / torch.maximum(safe, benign))

    def price(self, smoothing: float = 1.0, limit: float = 20.0) -> Tensor:
        """Return (safe + benign uses) / harmful uses, smoothed, at most ``limit``: float64 ``[K]``.

        What moving a row costs the safe and benign pictures, against what it can do to the harmful
        ones: the fine-tune's soft gate (`finetune.regulariser`).
        """
        return ((self.safe + self.benign + smoothing) / (self.harmful + smoothing)).clamp(max=limit)


@dataclass
class Alignment:
    """How often harmful token h meets safe token s != h at the same position of a pair.

    Sparse: sorted codes h·K + s with their counts, so memory grows with the distinct meetings and
    never as K².
    """

    size: int  # K
    codes: Tensor  # [M] int64, ascending
    counts: Tensor  # [M] float64

    @classmethod
    def empty(cls, size: int) -> Alignment:
        """Return no meetings, for a codebook of ``size`` rows."""
        return cls(size, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64))

    def add(self, harmful: Tensor, safe: Tensor, only: Tensor | None = None) -> Alignment:
        """Count the meetings in pairs ``[B,N]``, in place.

        ``only`` (bool ``[K]``) marks the harmful tokens that count (None: all). Raises UserError
        for tokens outside the codebook.
        """
        harmful, safe = checked_tokens(harmful, self.size), checked_tokens(safe, self.size)
        keep = harmful != safe if only is None else (harmful != safe) & only[harmful]
        codes = harmful[keep] * self.size + safe[keep]
        merged = self.merge(
            Alignment(self.size, codes, torch.ones(len(codes), dtype=torch.float64))
        )
        self.codes, self.counts = merged.codes, merged.counts
        return self

    def merge(self, other: Alignment) -> Alignment:
        """Return the meetings of both sets of pairs.

        Raises ValueError if the codebooks differ in size.
        """
        if self.size != other.size:
            raise ValueError(f"cannot merge alignments of {self.size} and {other.size} rows")
        codes, index = torch.unique(torch.cat([self.codes, other.codes]), return_inverse=True)
        counts = torch.zeros(len(codes), dtype=torch.float64)
        return Alignment(
            self.size, codes, counts.index_add_(0, index, torch.cat([self.counts, other.counts]))
        )
