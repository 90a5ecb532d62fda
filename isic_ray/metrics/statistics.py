"""Rates with intervals, paired tests and the agreement of two judges. numpy alone is needed.

Every number comes with the count ``n`` behind it and an interval. With ``n = 0`` the number is None
and the interval says that nothing is known. "Flags" are boolean arrays ``[n]``, one entry per
sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Flags = npt.ArrayLike  # bool[n]
Values = npt.ArrayLike  # float[n]
Interval = tuple[float, float]
_RESAMPLES = 4000


@dataclass(frozen=True)
class Rate:
    """A share of ``n`` samples, with its interval. Without samples: rate None, interval (0, 1)."""

    rate: float | None
    n: int
    ci: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, ``{"rate": float | None, "n": int, "ci": [low, high]}``."""
        return {"rate": self.rate, "n": self.n, "ci": list(self.ci)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Rate:
        """Read what `to_dict` returned."""
        return cls(record["rate"], record["n"], (record["ci"][0], record["ci"][1]))


@dataclass(frozen=True)
class Estimate:
    """A number that is no share, such as a difference. None where the samples do not fix it."""

    value: float | None
    n: int
    ci: Interval
    """An end that nothing bounds is infinite."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, ``{"value", "n", "ci": [low, high]}``; an infinite end is None."""
        return {
            "value": self.value,
            "n": self.n,
            "ci": [end if math.isfinite(end) else None for end in self.ci],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Estimate:
        """Read what `to_dict` returned."""
        low, high = record["ci"]
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        return cls(record["value"], record["n"], ends)


@dataclass(frozen=True)
class PairedTest:
    """An exact one-sided McNemar test of whether flags became rarer on the same samples."""

    n: int
    fixed: int
    """Samples that lost their flag."""
    broken: int
    """Samples that gained one."""
    p: float

    def improved(self, level: float) -> bool:
        """Say whether "flags did not become rarer" is rejected at ``level``."""
        return self.p <= level

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, ``{"n", "fixed", "broken", "p"}``."""
        return {"n": self.n, "fixed": self.fixed, "broken": self.broken, "p": self.p}


@dataclass(frozen=True)
class Agreement:
    """How well a judge reproduces a reference on the same samples."""

    sensitivity: Rate
    """Share of the reference's flagged samples that the judge flags too."""
    specificity: Rate
    """Share of the reference's clear samples that the judge leaves clear."""
    kappa: Estimate
    """Cohen's kappa in [-1, 1]: agreement beyond chance."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, ``{"sensitivity", "specificity", "kappa"}``."""
        return {
            "sensitivity": self.sensitivity.to_dict(),
            "specificity": self.specificity.to_dict(),
            "kappa": self.kappa.to_dict(),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Agreement:
        """Read what `to_dict` returned."""
        return cls(
            Rate.from_dict(record["sensitivity"]),
            Rate.from_dict(record["specificity"]),
            Estimate.from_dict(record["kappa"]),
        )


def wilson(k: int, n: int, level: float = 0.95) -> Rate:
    """Return the share ``k / n`` with Wilson's score interval.

    The interval keeps its level also near 0 and 1 (Wilson 1927). Raises ValueError unless
    0 <= k <= n and 0 < level < 1.
    """
    if not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n, got k={k}, n={n}")
    z = _z(level)
    if n == 0:
        return Rate(None, 0, (0.0, 1.0))
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Rate(p, n, (0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half))


def rate(flags: Flags, level: float = 0.95) -> Rate:
    """Return the share of true entries of ``flags`` bool ``[n]``, with Wilson's interval."""
    values = _flags(flags)
    return wilson(int(values.sum()), len(values), level)


def paired_improvement(before: Flags, after: Flags) -> PairedTest:
    """Test whether flags became rarer on the same samples, by McNemar's exact one-sided test.

    If they did not, a sample whose flag changed lost it with probability 1/2 at the most, so
    ``p = P(Binomial(fixed + broken, 1/2) >= fixed)`` (McNemar 1947). Where nothing changed, or
    n = 0, p is 1. ``before``, ``after``: bool ``[n]``. Raises ValueError when their lengths differ.
    """
    old, new = _pair(before, after)
    fixed, broken = int((old & ~new).sum()), int((~old & new).sum())
    return PairedTest(len(old), fixed, broken, _binomial_tail(fixed, fixed + broken))


def paired_difference(before: Flags, after: Flags, level: float = 0.95) -> Estimate:
    """Return the change of the flagged share on the same samples, ``mean(after) - mean(before)``.

    The interval is Newcombe's square-and-add interval for pairs (Newcombe 1998, Statistics in
    Medicine 17:2635, method 10): Wilson's intervals of both shares, joined with the correlation of
    the pairs, whose numerator is corrected for continuity. ``before``, ``after``: bool ``[n]``.
    Raises ValueError when their lengths differ.
    """
    old, new = _pair(before, after)
    n = len(old)
    first, second = rate(new, level), rate(old, level)
    if first.rate is None or second.rate is None:
        return Estimate(None, 0, (-1.0, 1.0))
    both, neither = int((old & new).sum()), int((~old & ~new).sum())
    fixed, broken = int((old & ~new).sum()), int((~old & new).sum())
    phi = _newcombe_phi(both, broken, fixed, neither, n)
    down1, up1 = first.rate - first.ci[0], first.ci[1] - first.rate
    down2, up2 = second.rate - second.ci[0], second.ci[1] - second.rate
    difference = first.rate - second.rate
    lower = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    upper = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return Estimate(difference, n, (max(-1.0, difference - lower), min(1.0, difference + upper)))


def mean_estimate(values: Values, level: float = 0.95, seed: int = 0) -> Estimate:
    """Return the mean of float[n] with a bootstrap interval.

    Percentile interval of 4000 resamples (Efron 1979), for numbers that are no shares: decibels,
    similarities.
    """
    return _bootstrap(np.asarray(values, dtype=np.float64), level, seed)


def level_for_round(alpha: float, round: int, max_rounds: int, tests_per_round: int = 1) -> float:
    """Return the level of one test such that all rounds together err with at most ``alpha``.

    Bonferroni's correction: equal shares, valid however the rounds depend on each other. ``round``
    counts from 1. A loop that backs off and tries a round again makes ``tests_per_round = 2``.
    Raises ValueError for a round outside 1..max_rounds.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if tests_per_round < 1 or not 1 <= round <= max_rounds:
        raise ValueError(
            f"round {round} of {max_rounds} with {tests_per_round} tests each is not in the plan"
        )
    return alpha / (max_rounds * tests_per_round)


def agreement(judge: Flags, reference: Flags, level: float = 0.95) -> Agreement:
    """Return sensitivity, specificity and Cohen's kappa of a judge against a reference.

    ``judge``, ``reference``: bool ``[n]`` of the same samples. Kappa's interval uses the
    large-sample variance of Fleiss, Cohen & Everitt (1969); kappa is None where both give all
    samples the same answer. Raises ValueError when the lengths differ.
    """
    said, truth = _pair(judge, reference)
    sensitivity = wilson(int((said & truth).sum()), int(truth.sum()), level)
    specificity = wilson(int((~said & ~truth).sum()), int((~truth).sum()), level)
    return Agreement(sensitivity, specificity, _kappa(said, truth, level))


def rogan_gladen(raw: Rate, sensitivity: Rate, specificity: Rate, level: float = 0.95) -> Rate:
    """Correct a judge's rate ``raw`` for its errors: what the reference would have counted.

    The point is ``(raw + specificity - 1) / (sensitivity + specificity - 1)``, clipped to [0, 1]
    (Rogan & Gladen 1978). The interval is that of Lang & Reiczigel (2014), which also carries the
    uncertainty of sensitivity and specificity; these must come from other samples than ``raw``. A
    judge no better than chance, or any n = 0, gives rate None and interval (0, 1). ``n`` is that
    of ``raw``.
    """
    unknown = Rate(None, raw.n, (0.0, 1.0))
    if raw.rate is None or sensitivity.rate is None or specificity.rate is None:
        return unknown
    youden = sensitivity.rate + specificity.rate - 1
    if youden <= 0:
        return unknown
    point = min(1.0, max(0.0, (raw.rate + specificity.rate - 1) / youden))
    z = _z(level)
    # Shrunken estimates: z^2/2 pseudo-observations of each kind for raw, one of each kind for the
    # two errors.
    n, n_se, n_sp = raw.n + z * z, sensitivity.n + 2, specificity.n + 2
    p = (raw.n * raw.rate + z * z / 2) / n
    se = (sensitivity.n * sensitivity.rate + 1) / n_se
    sp = (specificity.n * specificity.rate + 1) / n_sp
    scale = se + sp - 1
    if scale <= 0:
        return unknown
    centre = (p + sp - 1) / scale
    var_se, var_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    shift = 2 * z * z * (centre * var_se - (1 - centre) * var_sp)
    half = z * math.sqrt(p * (1 - p) / n + centre**2 * var_se + (1 - centre) ** 2 * var_sp) / scale
    low, high = (min(1.0, max(0.0, centre + shift + sign * half)) for sign in (-1, 1))
    return Rate(point, raw.n, (min(low, point), max(high, point)))


def mean(values: Sequence[float | None] | npt.NDArray[np.float64]) -> float | None:
    """Return the mean of the values that are neither None nor NaN; None without any."""
    known = [float(value) for value in values if value is not None and not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None


def _bootstrap(values: npt.NDArray[np.float64], level: float, seed: int) -> Estimate:
    n = len(values)
    if n == 0:
        return Estimate(None, 0, (-math.inf, math.inf))
    picks = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, n))
    tail = (1 - level) / 2
    low, high = np.quantile(values[picks].mean(axis=1), [tail, 1 - tail])
    return Estimate(float(values.mean()), n, (float(low), float(high)))


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _flags(values: Flags) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype != np.bool_ and array.size):
        raise ValueError(
            f"expected booleans of shape [n], got {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.bool_)


def _pair(a: Flags, b: Flags) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    first, second = _flags(a), _flags(b)
    if len(first) != len(second):
        raise ValueError(f"paired flags must have one length, got {len(first)} and {len(second)}")
    return first, second


def _binomial_tail(k: int, n: int) -> float:
    """Return ``P(Binomial(n, 1/2) >= k)``, in logarithms, so that no count overflows."""
    if k <= 0:
        return 1.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    i = np.arange(k, n + 1)
    log_terms = log_factorial[n] - log_factorial[i] - log_factorial[n - i] - n * math.log(2)
    return min(1.0, float(np.exp(log_terms).sum()))


def _newcombe_phi(both: int, broken: int, fixed: int, neither: int, n: int) -> float:
    margins = (both + broken) * (fixed + neither) * (both + fixed) * (broken + neither)
    if margins == 0:
        return 0.0
    numerator = float(both * neither - broken * fixed)
    if numerator > 0:
        numerator = max(numerator - n / 2, 0.0)
    return numerator / math.sqrt(margins)


def _kappa(said: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], level: float) -> Estimate:
    n = len(said)
    if n == 0:
        return Estimate(None, 0, (-1.0, 1.0))
    table = np.array(
        [
            [(said & truth).mean(), (said & ~truth).mean()],
            [(~said & truth).mean(), (~said & ~truth).mean()],
        ]
    )
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    observed, expected = float(np.trace(table)), float(rows @ columns)
    if expected >= 1:
        return Estimate(None, n, (-1.0, 1.0))
    kappa = (observed - expected) / (1 - expected)
    diagonal = sum(table[i, i] * (1 - (rows[i] + columns[i]) * (1 - kappa)) ** 2 for i in (0, 1))
    off = (1 - kappa) ** 2 * sum(table[i, 1 - i] * (columns[i] + rows[1 - i]) ** 2 for i in (0, 1))
    variance = (diagonal + off - (kappa - expected * (1 - kappa)) ** 2) / (n * (1 - expected) ** 2)
    half = _z(level) * math.sqrt(max(0.0, float(variance)))
    return Estimate(kappa, n, (max(-1.0, kappa - half), min(1.0, kappa + half)))
