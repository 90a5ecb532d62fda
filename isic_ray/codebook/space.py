"""Find the harmful space: an orthonormal basis V of the directions in which pairs differ.

`PairStatistics` streams in float64 and merges, so its memory does not depend on the number of
pairs.

Shapes: K rows of the codebook, d their width, B pairs in a batch, N tokens per picture, n rows of
differences D, k dimensions of the space V ``[d,k]``. ê are the rows as the decoder sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isic_ray.codebook.usage import checked_tokens
from isic_ray.errors import UserError

_CHUNK_ELEMENTS = 1 << 20  # float64 numbers held at once while adding a batch: 8 MB
_NULL = 1e-12  # eigenvalues below this share of the largest are rounding noise, not directions
# What two float32 spaces share differs by about 1e-7: smaller singular values are rounding noise.
_PARALLEL = 1e-5


def rows(codebook: Tensor, normalised: bool) -> Tensor:
    """Return ê ``[K,d]``, the rows of a table ``[K,d]`` as the decoder sees them.

    They are L2-normalised if the family normalises; rows of zeros stay zero.
    """
    return torch.nn.functional.normalize(codebook, dim=-1) if normalised else codebook


@dataclass
class PairStatistics:
    """What the harmful space needs of the differences D ``[n,d]`` of harmful and safe pictures.

    ``differences="token"``: one row of D per position, ê[h_n] - ê[s_n]; equal tokens give none.
    ``differences="pooled"``: one row of D per pair, mean_n ê[h_n] - mean_n ê[s_n] (the paper's
    reading).
    """

    gram: Tensor  # [d,d] float64, DᵀD
    total: Tensor  # [d] float64, the sum of D's rows
    count: int  # n, the number of D's rows
    differences: str

    @classmethod
    def empty(cls, width: int, differences: str = "token") -> PairStatistics:
        """Return the statistics of no pairs, for rows of ``width`` numbers.

        Raises UserError for an unknown kind of difference.
        """
        if differences not in ("token", "pooled"):
            raise UserError(f"edit.differences is {differences!r}, but must be token or pooled.")
        return cls(
            torch.zeros(width, width, dtype=torch.float64),
            torch.zeros(width, dtype=torch.float64),
            0,
            differences,
        )

    def add(
        self, harmful: Tensor, safe: Tensor, rows: Tensor, only: Tensor | None = None
    ) -> PairStatistics:
        """Add pairs ``[B,N]`` of tokens under ``rows`` ê ``[K,d]``, in place.

        ``only`` (bool ``[K]``) keeps the positions whose harmful token is marked and counts the
        others as equal. Raises ValueError for unlike shapes, UserError for tokens outside the
        codebook.
        """
        if harmful.shape != safe.shape or harmful.dim() != 2:
            raise ValueError(
                f"pairs must be two [B,N] tensors, got {list(harmful.shape)} and {list(safe.shape)}"
            )
        harmful, safe = checked_tokens(harmful, len(rows)), checked_tokens(safe, len(rows))
        step = max(1, _CHUNK_ELEMENTS // max(1, harmful.shape[1] * rows.shape[1]))
        for h_BN, s_BN in zip(torch.split(harmful, step), torch.split(safe, step), strict=True):
            keep_BN = h_BN != s_BN if only is None else (h_BN != s_BN) & only[h_BN]
            if self.differences == "token":
                deltas = rows[h_BN[keep_BN]].double() - rows[s_BN[keep_BN]].double()
            else:
                # The difference of two means over positions is the mean of the differences.
                every = rows[h_BN].double() - rows[s_BN].double()
                deltas = every.mul(keep_BN.unsqueeze(-1)).mean(dim=1)[keep_BN.any(dim=1)]
            self.gram += deltas.T @ deltas
            self.total += deltas.sum(dim=0)
            self.count += len(deltas)
        return self

    def merge(self, other: PairStatistics) -> PairStatistics:
        """Return the statistics of both sets of pairs.

        Raises ValueError if they hold different kinds of differences.
        """
        if self.differences != other.differences:
            raise ValueError(
                f"cannot merge {self.differences} with {other.differences} differences"
            )
        return PairStatistics(
            self.gram + other.gram,
            self.total + other.total,
            self.count + other.count,
            self.differences,
        )

    def scatter(self, centre: bool) -> Tensor:
        """Return DᵀD ``[d,d]`` float64; centred: DᵀD - n·mean·meanᵀ."""
        if not centre or self.count == 0:
            return self.gram
        mean = self.total / self.count
        return self.gram - self.count * torch.outer(mean, mean)


def spectrum(statistics: PairStatistics, centre: bool = False) -> Tensor:
    """Return the singular values of D, float64 ``[d]``, largest first."""
    values: Tensor = torch.linalg.eigvalsh(statistics.scatter(centre))
    return values.flip(0).clamp(min=0).sqrt()


def check_rank(rank: int, width: int) -> None:
    """Raise UserError unless 0 <= rank <= width - 1.

    A projection along every dimension would leave nothing to draw with.
    """
    if not 0 <= rank <= width - 1:
        raise UserError(
            f"edit.rank is {rank}, but a codebook with rows of {width} numbers allows 0 to "
            f"{width - 1}."
        )


def harmful_space(
    statistics: PairStatistics, rank: int, energy: float = 0.9, centre: bool = False
) -> Tensor:
    """Return V ``[d,k]`` float32, orthonormal: the top right singular vectors of D = U Σ Vᵀ.

    They are computed as eigenvectors of DᵀD. ``rank`` > 0 fixes k; 0 takes the smallest k whose σ²
    hold the share ``energy``, at most d - 1. k is smaller when the differences span fewer
    dimensions, because the remaining directions would be arbitrary. Signs are fixed. Raises
    UserError when the rank exceeds d - 1, the energy is outside (0, 1], or there is no difference
    to learn from.
    """
    width = len(statistics.gram)
    check_rank(rank, width)
    if not 0 < energy <= 1:
        raise UserError(f"edit.energy is {energy}, but must be above 0 and at most 1.")
    if statistics.count == 0:
        raise UserError(
            "There are no pairs whose harmful and safe tokens differ, so no harmful space can be "
            "found."
        )
    values, vectors = torch.linalg.eigh(statistics.scatter(centre))
    values, vectors = values.flip(0), vectors.flip(1)  # largest first
    # Measured against the uncentred size, so that the remainder of a cancelled mean does not pass
    # for a direction.
    spanned = int((values > _NULL * statistics.gram.trace()).sum())
    if spanned == 0:
        raise UserError(
            "All pairs differ in the same way or not at all, so their differences span no harmful "
            "space."
        )
    if rank == 0:
        share = values[:spanned].cumsum(0) / values[:spanned].sum()
        rank = min(int((share < energy - 1e-12).sum()) + 1, width - 1)
        if rank == 0:
            check_rank(1, width)
    return _fixed_signs(vectors[:, : min(rank, spanned)]).float()


def join(spaces: Sequence[Tensor], max_rank: int) -> Tensor:
    """Return one orthonormal basis float32 ``[d,k]``, k <= max_rank, of several spaces ``[d,k_i]``.

    SVD of [V_1 … V_m]: directions that concepts share come first, and above the budget the least
    shared are dropped. Raises UserError for no spaces or a budget outside 1 … d - 1.
    """
    if not spaces:
        raise UserError("There are no concepts with pairs, so there is no harmful space to join.")
    width = spaces[0].shape[0]
    check_rank(max_rank, width)
    stacked = torch.cat([space.double() for space in spaces], dim=1)
    u, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
    spanned = int((sigma > _PARALLEL).sum())
    return _fixed_signs(u[:, : min(spanned, max_rank)]).float()


def random_space(width: int, rank: int, seed: int) -> Tensor:
    """Return V ``[d,k]`` float32, orthonormal and uniformly random, for the control arm.

    Raises UserError when ``rank`` k exceeds ``width`` d - 1.
    """
    check_rank(rank, width)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64, generator=generator))
    return _fixed_signs(q).float()


def _fixed_signs(vectors: Tensor) -> Tensor:
    """Turn columns ``[d,k]`` so that the entry of largest size is positive.

    Singular vectors have no sign of their own.
    """
    if vectors.shape[1] == 0:
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
