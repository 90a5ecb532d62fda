"""Edit a codebook, E → E′: one pure function per equation, and `build_edit`, which picks by name.

Arithmetic is float64, results have the codebook's dtype, and a row that an edit does not touch
keeps its exact bits.

Shapes: K rows of the codebook, d their width, k dimensions of the harmful space V ``[d,k]``, P
pairs, B benign pictures, N tokens per picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isic_ray.codebook.space import PairStatistics, harmful_space, join, random_space, rows
from isic_ray.codebook.usage import Alignment, UsageCounts
from isic_ray.config.run import EditConfig
from isic_ray.errors import UserError

METHODS = ("paper", "selective", "transport", "random", "none")
# An edited row shorter than this share of its base row has lost its direction to rounding.
_VANISHED = 1e-6
_FALLBACK_CHUNK = 1 << 22  # similarities held at once while searching nearest rows: 32 MB


@dataclass(frozen=True)
class Edit:
    """An edited table, the harmful space that the fine-tune must avoid, and the changed rows."""

    codebook: Tensor  # E′ [K,d], dtype of the base
    basis: Tensor | None  # V [d,k] float32; None when nothing was edited
    changed: Tensor  # [K] bool, the rows whose bits changed


def project(codebook: Tensor, basis: Tensor, strength: float) -> Tensor:
    """Return E′ = E (I - α V Vᵀ) ``[K,d]`` (method `paper`)."""
    return project_rows(codebook, basis, strength, torch.ones(len(codebook)))


def project_rows(codebook: Tensor, basis: Tensor, strength: float, gate: Tensor) -> Tensor:
    """Return E′[j] = E[j] (I - α g_j V Vᵀ) ``[K,d]``.

    The gate g ``[K]`` is bool, or a number from 0 to 1.
    """
    table, space = codebook.double(), basis.to(codebook.device).double()
    weight = strength * gate.to(codebook.device).double()
    edited = table - weight.unsqueeze(1) * (table @ space) @ space.T
    return torch.where(weight.unsqueeze(1) == 0, codebook, edited.to(codebook.dtype))


def renormalise(edited: Tensor, codebook: Tensor) -> Tensor:
    """Return edited rows ``[K,d]`` scaled to the norm of their row of ``codebook`` ``[K,d]``.

    This is for families that ignore norms. A row that vanished (it lay wholly in the removed space)
    has no direction left: it goes back to its base row rather than to amplified rounding noise.
    Unchanged rows keep their bits.
    """
    new, old = edited.double(), codebook.double()
    length, target = new.norm(dim=1, keepdim=True), old.norm(dim=1, keepdim=True)
    keep = (length <= _VANISHED * target) | (edited == codebook).all(dim=1, keepdim=True)
    scaled = new * (target / torch.where(keep, 1.0, length))
    return torch.where(keep, codebook, scaled.to(codebook.dtype))


def transport(codebook: Tensor, target_of: Tensor, strength: float, normalised: bool) -> Tensor:
    """Return E′[j] = (1 - α) E[j] + α E[t_j] ``[K,d]``.

    ``target_of`` t is int64 ``[K]``, with t_j = j for untouched rows. Normalised families mix unit
    rows and keep the norm of E[j], so that α means the same whatever the norms.
    """
    if strength == 0:
        return codebook.clone()
    seen = rows(codebook.double(), normalised)
    mixed = (1 - strength) * seen + strength * seen[target_of]
    untouched = target_of == torch.arange(len(codebook), device=target_of.device)
    edited = torch.where(untouched.unsqueeze(1), codebook, mixed.to(codebook.dtype))
    return renormalise(edited, codebook) if normalised else edited


def interpolate(start: Tensor, end: Tensor, share: float, normalised: bool) -> Tensor:
    """Return (1 - β) E_start + β E_end ``[K,d]`` with β = ``share``: a round's step, damped.

    Equal rows keep their bits. Normalised families mix unit rows and keep the norms of ``start``,
    as `transport` does.
    """
    if share == 1:
        return end.clone()
    left, right = rows(start.double(), normalised), rows(end.double(), normalised)
    same = (start == end).all(dim=1, keepdim=True)
    mixed = torch.where(same, start, ((1 - share) * left + share * right).to(start.dtype))
    return renormalise(mixed, start) if normalised else mixed


def select_rows(
    log_odds: Tensor, counts: Tensor, min_log_odds: float, min_count: float, max_rows: int = 0
) -> Tensor:
    """Return bool ``[K]``: rows with log-odds >= min_log_odds and harmful uses >= min_count.

    ``log_odds`` and ``counts`` (harmful uses) are ``[K]``. Of more than ``max_rows`` (> 0) the ones
    that carry most evidence, count · log-odds, stay; ties to the lower index.
    """
    mask = (log_odds >= min_log_odds) & (counts >= min_count)
    if max_rows > 0 and int(mask.sum()) > max_rows:
        evidence = torch.where(mask, counts * log_odds, -math.inf)
        best = torch.argsort(evidence, descending=True, stable=True)[:max_rows]
        mask = torch.zeros_like(mask).index_fill_(0, best, True)
    return mask


def transport_targets(
    alignment: Alignment, selected: Tensor, safe_counts: Tensor, seen: Tensor
) -> Tensor:
    """Return int64 ``[K]``: where each row goes; rows outside ``selected`` stay, t_j = j.

    A row of ``selected`` (bool ``[K]``) goes to the unselected safe token that it meets most often
    at the same position. Without such a meeting it goes to the row nearest by cosine (``seen`` is
    ê ``[K,d]``) among the unselected rows that safe pictures use (``safe_counts`` ``[K]`` > 0),
    else among all unselected ones. Ties go to the lowest index.
    """
    size = len(selected)
    target_of = torch.arange(size)
    harmful, safe = alignment.codes // size, alignment.codes % size
    usable = selected[harmful] & ~selected[safe]
    harmful, safe, met = harmful[usable], safe[usable], alignment.counts[usable]
    # Codes ascend by (h, s); two stable sorts leave each h with its commonest s first, ties by
    # lowest s.
    order = torch.argsort(met, descending=True, stable=True)
    order = order[torch.argsort(harmful[order], stable=True)]
    harmful, safe = harmful[order], safe[order]
    first = torch.ones_like(harmful, dtype=torch.bool)
    first[1:] = harmful[1:] != harmful[:-1]
    target_of[harmful[first]] = safe[first]

    lost = (selected & (target_of == torch.arange(size))).nonzero().flatten()
    candidates = (~selected & (safe_counts > 0)).nonzero().flatten()
    if len(candidates) == 0:
        candidates = (~selected).nonzero().flatten()
    if len(lost) and len(candidates):
        target_of[lost] = candidates[_nearest(seen[lost], seen[candidates])]
    return target_of


def _nearest(queries: Tensor, candidates: Tensor) -> Tensor:
    """Return int64 ``[Q]``: for each query ``[Q,d]`` the candidate ``[C,d]`` of largest cosine.

    Ties go to the lowest index.
    """
    queries, candidates = rows(queries.double(), True), rows(candidates.double(), True)
    index = torch.arange(len(candidates))
    found = []
    for chunk in torch.split(queries, max(1, _FALLBACK_CHUNK // len(candidates))):
        cosine = chunk @ candidates.T
        best = cosine == cosine.amax(dim=1, keepdim=True)
        # Not argmax, which promises no order among ties.
        found.append(torch.where(best, index, len(candidates)).amin(dim=1))
    return torch.cat(found)


def build_edit(
    base_codebook: Tensor,
    pairs_harmful: Tensor,
    pairs_safe: Tensor,
    benign_tokens: Tensor,
    config: EditConfig,
    normalised: bool,
    seed: int = 0,
    concepts_of_pair: Sequence[Sequence[str]] | None = None,
) -> Edit:
    """Return the edit that ``config`` names, of a table ``[K,d]`` on CPU.

    It is built from pairs ``[P,N]`` and benign tokens ``[B,N]``. ``concepts_of_pair`` (P entries)
    is used with ``config.merge`` off: one space per concept, then joined; a pair with several
    concepts counts for each. ``seed`` steers the random arm, which gets as many dimensions as
    `paper` would. When no row passes the thresholds of selective or transport, the table comes back
    unchanged with ``basis`` None: callers check ``changed``. Raises UserError for an unknown
    method, a bad setting, or no pairs.
    """
    _check_settings(config)
    if config.method == "none":
        return _result(base_codebook, base_codebook, None)
    if len(pairs_harmful) == 0:
        raise UserError(
            "There are no pairs of a harmful and a safe picture, so there is nothing to build an "
            "edit from."
        )
    seen = rows(base_codebook, normalised)
    space = _SpaceBuilder(pairs_harmful, pairs_safe, seen, config, concepts_of_pair)

    if config.method in ("paper", "random"):
        basis = space.build(only=None)
        if config.method == "random":
            basis = random_space(base_codebook.shape[1], basis.shape[1], seed)
        gate = torch.ones(len(seen))
    else:
        usage = UsageCounts.empty(len(seen)).add(pairs_harmful, pairs_safe, benign_tokens)
        gate = select_rows(
            usage.log_odds(config.smoothing),
            usage.harmful,
            config.min_log_odds,
            config.min_count,
            config.max_rows,
        )
        if not gate.any():
            return _result(base_codebook, base_codebook, None)
        basis = space.build(only=gate)
        if config.method == "transport":
            alignment = Alignment.empty(len(seen)).add(pairs_harmful, pairs_safe, only=gate)
            target_of = transport_targets(alignment, gate, usage.safe, seen)
            edited = transport(base_codebook, target_of, config.strength, normalised)
            return _result(edited, base_codebook, basis)
    edited = project_rows(base_codebook, basis, config.strength, gate)
    if normalised:
        edited = renormalise(edited, base_codebook)
    return _result(edited, base_codebook, basis)


def _check_settings(config: EditConfig) -> None:
    if config.method not in METHODS:
        raise UserError(
            f"edit.method is {config.method!r}, but must be one of {', '.join(METHODS)}."
        )
    if not (config.strength >= 0 and math.isfinite(config.strength)):
        raise UserError(f"edit.strength is {config.strength}, but must be 0 or more.")


def _result(edited: Tensor, base: Tensor, basis: Tensor | None) -> Edit:
    return Edit(edited.clone() if edited is base else edited, basis, (edited != base).any(dim=1))


@dataclass(frozen=True)
class _SpaceBuilder:
    """Builds the harmful space of some pairs under one configuration."""

    harmful: Tensor  # [P,N]
    safe: Tensor  # [P,N]
    seen: Tensor  # ê [K,d]
    config: EditConfig
    concepts_of_pair: Sequence[Sequence[str]] | None

    def build(self, only: Tensor | None) -> Tensor:
        """Return V ``[d,k]`` of the differences.

        ``only`` (bool ``[K]``) marks the harmful tokens whose positions count (None: all).
        """
        groups = self._groups()
        statistics = [
            PairStatistics.empty(self.seen.shape[1], self.config.differences).add(
                self.harmful[group], self.safe[group], self.seen, only
            )
            for group in groups
        ]
        if len(groups) > 1:  # a concept without a difference has no say, unless none has
            statistics = [each for each in statistics if each.count > 0] or statistics[:1]
        spaces = [
            harmful_space(each, self.config.rank, self.config.energy, self.config.centre)
            for each in statistics
        ]
        return spaces[0] if len(spaces) == 1 else join(spaces, max_rank=self.seen.shape[1] - 1)

    def _groups(self) -> list[Tensor]:
        """Return the indices of each concept's pairs, by the concepts' names; one group if merged.

        Raises ValueError when there are not as many lists of concepts as pairs.
        """
        if self.config.merge or self.concepts_of_pair is None:
            return [torch.arange(len(self.harmful))]
        if len(self.concepts_of_pair) != len(self.harmful):
            raise ValueError(
                f"{len(self.concepts_of_pair)} lists of concepts for {len(self.harmful)} pairs"
            )
        tagged = [tuple(concepts) or ("",) for concepts in self.concepts_of_pair]
        names = sorted({name for concepts in tagged for name in concepts})
        return [
            torch.tensor([i for i, concepts in enumerate(tagged) if name in concepts])
            for name in names
        ]
