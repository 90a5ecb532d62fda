"""Rates with intervals, paired tests, agreement of two judges, picture fidelity. numpy and the
standard library only.

Every number comes with the count ``n`` behind it and an interval; with ``n = 0`` the number is None
and the interval says that nothing is known. "flags" are boolean arrays ``[n]``, one entry a sample.
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
    """A share of ``n`` samples in [0, 1] with its interval. ``n = 0``: rate None, interval (0,
    1).
    """

    rate: float | None
    n: int
    ci: Interval

    def to_dict(self) -> dict[str, Any]:
        """The shape of summary.json: ``{"rate": float | None, "n": int, "ci": [lo, hi]}``."""
        return {"rate": self.rate, "n": self.n, "ci": list(self.ci)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Rate:
        """Read what `to_dict` returned."""
        return cls(record["rate"], record["n"], (record["ci"][0], record["ci"][1]))


@dataclass(frozen=True)
class Estimate:
    """A number that is no share: a difference, a kappa. None where ``n`` samples do not
    determine it.
    """

    value: float | None
    n: int
    ci: Interval

    def to_dict(self) -> dict[str, Any]:
        """``{"value": float | None, "n": int, "ci": [lo, hi]}``; None for an end that nothing
        bounds.
        """
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
    """Exact one-sided McNemar test that flags became rarer. ``fixed``: lost its flag,
    ``broken``: gained one.
    """

    n: int
    fixed: int
    broken: int
    p: float

    def improved(self, level: float) -> bool:
        """True when "it got no better" is rejected at ``level``."""
        return self.p <= level

    def to_dict(self) -> dict[str, Any]:
        """``{"n", "fixed", "broken", "p"}``."""
        return {"n": self.n, "fixed": self.fixed, "broken": self.broken, "p": self.p}


@dataclass(frozen=True)
class Agreement:
    """How well a judge reproduces a reference on the same samples."""

    sensitivity: Rate  # share of the reference's flags that the judge flags too
    specificity: Rate  # share of the reference's clear samples that the judge leaves clear
    kappa: Estimate  # Cohen's kappa in [-1, 1]: agreement beyond chance

    def to_dict(self) -> dict[str, Any]:
        """``{"sensitivity": Rate, "specificity": Rate, "kappa": Estimate}`` as dicts."""
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
    """Share ``k / n`` with Wilson's score interval (Wilson 1927), which keeps its level also near 0
    and 1.

    Raises ValueError unless 0 <= k <= n and 0 < level < 1.
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
    """Share of true entries of ``flags`` bool[n], with Wilson's interval."""
    values = _flags(flags)
    return wilson(int(values.sum()), len(values), level)


def paired_improvement(before: Flags, after: Flags) -> PairedTest:
    """Did flags become rarer on the same samples? Exact one-sided McNemar test (McNemar 1947).

    Under "no better", a sample whose flag changed lost it with probability 1/2 at the most, so
    ``p = P(Binomial(fixed + broken, 1/2) >= fixed)``. Nothing changed, or n = 0: p = 1.
    ``before``, ``after``: bool[n]. Raises ValueError when their lengths differ.
    """
    old, new = _pair(before, after)
    fixed, broken = int((old & ~new).sum()), int((~old & new).sum())
    return PairedTest(len(old), fixed, broken, _binomial_tail(fixed, fixed + broken))


def paired_difference(before: Flags, after: Flags, level: float = 0.95) -> Estimate:
    """Change of the flagged share, ``mean(after) - mean(before)``, with an interval for paired
    samples.

    Newcombe's square-and-add interval (Newcombe 1998, Statistics in Medicine 17:2635, method 10):
    Wilson intervals of both shares joined with the correlation of the pairs, its numerator
    corrected for continuity. ``before``, ``after``: bool[n]. Raises ValueError when their lengths
    differ.
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
    """Level at which to test in ``round`` (1-based) so that all rounds together raise a false alarm
    in <= ``alpha``.

    Bonferroni: equal shares, valid whatever the rounds have to do with each other. A loop that
    backs off and tries a round again makes ``tests_per_round = 2``. Raises ValueError for a round
    outside 1..max_rounds.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if tests_per_round < 1 or not 1 <= round <= max_rounds:
        raise ValueError(
            f"round {round} of {max_rounds} with {tests_per_round} tests each is not within the plan"
        )
    return alpha / (max_rounds * tests_per_round)


def agreement(judge: Flags, reference: Flags, level: float = 0.95) -> Agreement:
    """Sensitivity, specificity and Cohen's kappa of a judge against a reference, each with an
    interval.

    ``judge``, ``reference``: bool[n] of the same samples. Kappa's interval uses the large-sample
    variance of Fleiss, Cohen & Everitt (1969); kappa is None where both always say the same single
    thing. Raises ValueError when the lengths differ.
    """
    said, truth = _pair(judge, reference)
    sensitivity = wilson(int((said & truth).sum()), int(truth.sum()), level)
    specificity = wilson(int((~said & ~truth).sum()), int((~truth).sum()), level)
    return Agreement(sensitivity, specificity, _kappa(said, truth, level))


def rogan_gladen(raw: Rate, sensitivity: Rate, specificity: Rate, level: float = 0.95) -> Rate:
    """What the reference would have counted: ``raw`` corrected for the judge's errors, clipped to
    [0, 1].

    Point: (raw + specificity - 1) / (sensitivity + specificity - 1) (Rogan & Gladen 1978).
    Interval: Lang & Reiczigel (2014), which also carries the uncertainty of sensitivity and
    specificity; these must come from other samples than ``raw``. A judge no better than chance, or
    any n = 0, yields rate None and (0, 1). ``n`` is that of ``raw``.
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
    se, sp = (
        (sensitivity.n * sensitivity.rate + 1) / n_se,
        (specificity.n * specificity.rate + 1) / n_sp,
    )
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
    """Mean of the values that exist; None when none does."""
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
    """P(Binomial(n, 1/2) >= k), exact up to the rounding of floats: no count overflows."""
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
