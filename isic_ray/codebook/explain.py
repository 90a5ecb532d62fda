"""Explain what an edit did: which rows, how far, along which harmful directions. torch only.

Shapes: K rows of the codebook, d their width, P pairs, B benign pictures, N tokens per picture, C
changed rows, k harmful directions, M rows shown per direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from isic_ray.codebook.space import PairStatistics, harmful_space, rows, spectrum
from isic_ray.codebook.usage import UsageCounts

_SAME = 0.999  # cosine from which two rows draw the same


@dataclass(frozen=True)
class Explanation:
    """``facts`` are JSON types; the tensors serve the report's pictures."""

    facts: dict[str, Any]
    changed: Tensor  # [C] int64, rows whose bits changed, most harmful uses first
    directions: Tensor  # [d,k] float32, the harmful space of all pairs
    nearest: Tensor  # [k,M] int64, the rows that lie furthest along each direction


def explain(
    base: Tensor,
    edited: Tensor,
    harmful: Tensor,
    safe: Tensor,
    benign: Tensor,
    concepts: Sequence[Sequence[str]],
    normalised: bool,
    rank: int = 2,
    shown: int = 8,
) -> Explanation:
    """Explain what turned the table ``base`` ``[K,d]`` into ``edited`` ``[K,d]``.

    ``harmful`` and ``safe`` are the pairs' tokens ``[P,N]``, ``concepts`` their P lists of
    concepts, ``benign`` the tokens ``[B,N]`` of benign pictures. ``rank`` is the number of
    directions, ``shown`` the number of rows per direction.
    """
    usage = UsageCounts.empty(len(base)).add(harmful, safe, benign)
    seen = rows(base, normalised)
    statistics = PairStatistics.empty(base.shape[1]).add(harmful, safe, seen)
    changed = (edited != base).any(1).nonzero().flatten()
    changed = changed[usage.harmful[changed].argsort(descending=True, stable=True)]
    facts: dict[str, Any] = {"rows": len(base), "distortion": distortion(base, edited)}
    facts["usage"] = {
        "harmful": _share(usage.harmful, changed),
        "safe": _share(usage.safe, changed),
        "benign": _share(usage.benign, changed),
    }
    directions, nearest = torch.zeros(base.shape[1], 0), torch.zeros(0, shown, dtype=torch.int64)
    if statistics.count:
        values = spectrum(statistics)
        facts["spectrum"] = (values.square() / values.square().sum().clamp(min=1e-30)).tolist()
        directions = harmful_space(statistics, min(rank, base.shape[1] - 1))
        nearest = (seen @ directions).T.topk(min(shown, len(base)), dim=1).indices
        facts["principal_angles"] = _angles(harmful, safe, seen, concepts, rank)
    return Explanation(facts, changed, directions, nearest)


def distortion(base: Tensor, edited: Tensor) -> dict[str, Any]:
    """Return how far the rows ``[K,d]`` moved, as JSON types.

    ``changed`` rows, quartiles of their cosines to where they were, ``colliding`` rows, whose
    direction comes within cosine 0.999 of another row's and did not before, and ``dead`` rows, that
    lost their norm.
    """
    changed = (edited != base).any(1)
    cosine = torch.nn.functional.cosine_similarity(base.double(), edited.double(), dim=1)[changed]
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    return {
        "changed": int(changed.sum()),
        "cosine_quartiles": torch.quantile(cosine, levels).tolist() if len(cosine) else [],
        "colliding": int((_crowded(edited, changed) & ~_crowded(base, changed)).sum()),
        "dead": int((edited.norm(dim=1) < 1e-6).sum() - (base.norm(dim=1) < 1e-6).sum()),
    }


def touched(tokens: Tensor, base: Tensor, edited: Tensor) -> Tensor:
    """Return bool ``[B,N]``: the tokens ``[B,N]`` whose rows an edit changed."""
    return (edited != base).any(1)[tokens.long()]


def _crowded(table: Tensor, which: Tensor) -> Tensor:
    """Return bool ``[K]``: the rows of ``which`` (bool ``[K]``) with another row within `_SAME`."""
    unit = torch.nn.functional.normalize(table.float(), dim=1)
    index = which.nonzero().flatten()
    found = torch.zeros(len(table), dtype=torch.bool)
    for part in torch.split(index, 1024):
        found[part] = (unit[part] @ unit.T > _SAME).sum(1) > 1
    return found


def _share(counts: Tensor, changed: Tensor) -> float:
    return float(counts[changed].sum() / counts.sum().clamp(min=1))


def _angles(
    harmful: Tensor, safe: Tensor, seen: Tensor, concepts: Sequence[Sequence[str]], rank: int
) -> dict[str, list[float]]:
    """Return the principal angles between the harmful spaces of every two concepts.

    In degrees, smallest first, by "ONE and OTHER".
    """
    spaces = {}
    for name in sorted({name for names in concepts for name in names}):
        index = torch.tensor([i for i, names in enumerate(concepts) if name in names])
        statistics = PairStatistics.empty(seen.shape[1]).add(harmful[index], safe[index], seen)
        if statistics.count:
            spaces[name] = harmful_space(statistics, min(rank, seen.shape[1] - 1))
    angles = {}
    for one, other in combinations(spaces, 2):
        cosines = torch.linalg.svdvals(spaces[one].T @ spaces[other])
        angles[f"{one} and {other}"] = torch.rad2deg(cosines.clamp(max=1).acos()).tolist()
    return angles
