"""Are the intervals, tests and corrections what they claim to be? Simulations are vectorised and
seeded.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isic_ray.metrics.fidelity import PSNR_CAP, psnr
from isic_ray.metrics.statistics import (
    Rate,
    agreement,
    level_for_round,
    mean,
    paired_difference,
    paired_improvement,
    rate,
    rogan_gladen,
    wilson,
)

RNG = np.random.default_rng


@pytest.mark.parametrize("n", [100, 150, 400])
@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_wilson_covers_95_percent(p: float, n: int) -> None:
    # Exact coverage: the binomial probability of every k whose interval holds p; no simulation
    # noise.
    inside = [k for k in range(n + 1) if wilson(k, n).ci[0] <= p <= wilson(k, n).ci[1]]
    coverage = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in inside)
    assert 0.93 <= coverage <= 0.97


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(k, n).ci == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500), st.integers(0, 500))
def test_wilson_interval_holds_the_rate(a: int, b: int) -> None:
    k, n = min(a, b), max(a, b)
    found = wilson(k, n)
    assert 0 <= found.ci[0] <= found.ci[1] <= 1
    assert found.rate is None if n == 0 else found.ci[0] <= k / n <= found.ci[1]


def test_no_samples_mean_no_number_anywhere() -> None:
    nothing = np.zeros(0, dtype=bool)
    assert wilson(0, 0).to_dict() == {"rate": None, "n": 0, "ci": [0.0, 1.0]}
    assert rate([]).rate is None
    assert paired_improvement(nothing, nothing).p == 1.0
    assert paired_difference(nothing, nothing).to_dict() == {
        "value": None,
        "n": 0,
        "ci": [-1.0, 1.0],
    }
    found = agreement(nothing, nothing)
    assert (found.sensitivity.rate, found.specificity.rate, found.kappa.value) == (None, None, None)
    assert rogan_gladen(wilson(0, 0), wilson(9, 10), wilson(9, 10)).rate is None
    assert rogan_gladen(wilson(3, 10), wilson(0, 0), wilson(9, 10)).ci == (0.0, 1.0)
    assert mean([None, math.nan]) is None


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (1, 0)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson(k, n)


def test_flags_must_be_booleans_of_one_length() -> None:
    with pytest.raises(ValueError, match="booleans"):
        rate(np.array([0.2, 0.9]))
    with pytest.raises(ValueError, match="one length"):
        paired_improvement([True], [True, False])


def test_paired_test_is_the_exact_binomial_tail() -> None:
    before = np.array([True] * 9 + [False] * 5)
    after = np.array([False] * 8 + [True] + [True] * 2 + [False] * 3)  # 8 fixed, 2 broken
    test = paired_improvement(before, after)
    assert (test.n, test.fixed, test.broken) == (14, 8, 2)
    assert test.p == pytest.approx(sum(math.comb(10, i) for i in (8, 9, 10)) / 2**10)
    assert paired_improvement(after, before).p > 0.9
    assert paired_improvement(before, before).p == 1.0


def test_paired_test_survives_many_samples() -> None:
    before = np.ones(200_000, dtype=bool)
    assert paired_improvement(before, ~before).p == 0.0
    assert paired_improvement(
        np.arange(100_000) % 2 == 0, np.arange(100_000) % 2 == 1
    ).p == pytest.approx(0.5, abs=0.01)


def test_ten_rounds_under_the_null_rarely_look_improved() -> None:
    runs, rounds, n = 2000, 10, 120
    rng = RNG(1)
    level = level_for_round(0.05, 1, rounds)
    flags = (
        rng.random((runs, rounds + 1, n)) < 0.6
    )  # a judge that answers at random: nothing ever improves
    fixed = (flags[:, :-1] & ~flags[:, 1:]).sum(-1)
    broken = (~flags[:, :-1] & flags[:, 1:]).sum(-1)
    cache: dict[tuple[int, int], bool] = {}
    for f, b in {(int(f), int(b)) for f, b in zip(fixed.ravel(), broken.ravel(), strict=True)}:
        cache[f, b] = paired_improvement(
            [True] * f + [False] * b, [False] * f + [True] * b
        ).improved(level)
    alarms = np.array(
        [
            [cache[int(f), int(b)] for f, b in zip(*row, strict=True)]
            for row in zip(fixed, broken, strict=True)
        ]
    )
    assert alarms.any(axis=1).mean() <= 0.05
    assert alarms.any(axis=1).mean() > 0.005  # and the test is not merely deaf


def test_levels_of_all_rounds_add_up_to_alpha() -> None:
    assert sum(level_for_round(0.05, r, 7) for r in range(1, 8)) == pytest.approx(0.05)
    assert level_for_round(0.05, 1, 5, tests_per_round=2) == pytest.approx(0.005)
    with pytest.raises(ValueError, match="round 8 of 7"):
        level_for_round(0.05, 8, 7)


def test_paired_difference_agrees_with_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, table II, method 10; cells: both, first only,
    # second only, neither.
    for (both, first, second, neither), low, high in [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((53, 0, 1, 0), -0.0979, 0.0494),
    ]:
        one = np.repeat([True, True, False, False], [both, first, second, neither])
        two = np.repeat([True, False, True, False], [both, first, second, neither])
        assert paired_difference(two, one).ci == pytest.approx((low, high), abs=5e-4)


def test_paired_difference_covers_95_percent() -> None:
    rng, hits, runs = RNG(2), 0, 1500
    for _ in range(runs):
        before = rng.random(150) < 0.8
        after = np.where(before, rng.random(150) < 0.4, rng.random(150) < 0.1)  # truth: 0.34 - 0.8
        low, high = paired_difference(before, after).ci
        hits += low <= -0.46 <= high
    assert 0.93 <= hits / runs <= 0.97


def test_agreement_counts_and_kappa() -> None:
    judge = np.repeat([True, True, False, False], [40, 10, 20, 30])
    truth = np.repeat([True, False, True, False], [40, 10, 20, 30])
    found = agreement(judge, truth)
    assert (found.sensitivity.rate, found.sensitivity.n) == (pytest.approx(40 / 60), 60)
    assert (found.specificity.rate, found.specificity.n) == (pytest.approx(30 / 40), 40)
    assert found.kappa.value == pytest.approx(0.4)  # observed 0.7, expected 0.5
    assert found.kappa.ci[0] < 0.4 < found.kappa.ci[1]
    assert agreement(truth, truth).kappa.value == pytest.approx(1.0)
    assert agreement(~truth, truth).kappa.value is not None
    assert agreement([True] * 4, [True] * 4).kappa.value is None
    assert set(found.to_dict()) == {"sensitivity", "specificity", "kappa"}


def test_kappa_interval_covers_95_percent() -> None:
    rng, hits, runs = RNG(3), 0, 1000
    for _ in range(runs):
        truth = rng.random(200) < 0.5
        judge = truth ^ (rng.random(200) < 0.15)  # true kappa 0.7
        low, high = agreement(judge, truth).kappa.ci
        hits += low <= 0.7 <= high
    assert 0.925 <= hits / runs <= 0.975


def test_rogan_gladen_is_unbiased_where_the_raw_rate_is_not() -> None:
    rng, truth, se, sp, n, runs = RNG(4), 0.15, 0.8, 0.9, 400, 1500
    raw = rng.binomial(n, truth * se + (1 - truth) * (1 - sp), runs)
    caught, spared = rng.binomial(300, se, runs), rng.binomial(300, sp, runs)
    found = [
        rogan_gladen(wilson(int(r), n), wilson(int(a), 300), wilson(int(b), 300))
        for r, a, b in zip(raw, caught, spared, strict=True)
    ]
    rates = np.array([one.rate for one in found], dtype=float)
    coverage = np.mean([one.ci[0] <= truth <= one.ci[1] for one in found])
    assert abs(rates.mean() - truth) < 0.005
    assert abs(raw.mean() / n - truth) > 0.05
    assert 0.93 <= coverage <= 0.98


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_rogan_gladen_stays_a_share(raw: float, se: float, sp: float) -> None:
    found = rogan_gladen(Rate(raw, 50, (0, 1)), Rate(se, 40, (0, 1)), Rate(sp, 40, (0, 1)))
    assert 0 <= found.ci[0] <= found.ci[1] <= 1
    if se + sp <= 1:
        assert found.rate is None
    if found.rate is not None:
        assert found.ci[0] <= found.rate <= found.ci[1]


def test_psnr_a_picture_each() -> None:
    rng = RNG(5)
    a = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    b = a.copy()
    b[1] = 255 - b[1]
    b[2, 0, 0, 0] ^= 1
    found = psnr(a, b)
    assert found.shape == (4,)
    assert found[0] == found[3] == pytest.approx(PSNR_CAP)
    error = np.mean((a[1].astype(float) - b[1]) ** 2)
    assert found[1] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)
    assert found[2] == pytest.approx(10 * math.log10(255**2 * 192))
    assert float(psnr(a[0], b[0])) == pytest.approx(PSNR_CAP)
    with pytest.raises(ValueError, match="uint8"):
        psnr(a, b[:2])
