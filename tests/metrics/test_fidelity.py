"""Are fidelity and distances what their papers define, on cases with known answers?"""

from __future__ import annotations

import numpy as np
import pytest

from isic_ray.metrics.fidelity import gmsd, ssim
from isic_ray.metrics.statistics import mean_estimate

RNG = np.random.default_rng


def pictures(seed: int, count: int = 3, side: int = 32) -> np.ndarray:
    return RNG(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_equal_pictures_are_equal() -> None:
    a = pictures(0)
    assert ssim(a, a) == pytest.approx([1, 1, 1])
    assert gmsd(a, a) == pytest.approx([0, 0, 0])


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    a, b = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b)[0] == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    assert gmsd(a, b)[0] == pytest.approx(0)  # flat pictures have no gradients to lose


def test_more_noise_is_further_away() -> None:
    base = np.repeat(
        np.linspace(0, 255, 32).astype(np.uint8)[None, :, None, None], 32, axis=2
    ).repeat(3, axis=3)
    noise = RNG(1).normal(size=base.shape)
    noisy = [np.clip(base + level * noise, 0, 255).astype(np.uint8) for level in (2, 10, 40)]
    similar, distant = (
        [ssim(base, each)[0] for each in noisy],
        [gmsd(base, each)[0] for each in noisy],
    )
    assert similar == sorted(similar, reverse=True)
    assert distant == sorted(distant)


def test_unlike_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="two uint8"):
        ssim(pictures(0), pictures(0, side=16))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(pictures(0, side=8), pictures(0, side=8))


def test_bootstrap_intervals_cover_95_percent() -> None:
    rng, hits, runs = RNG(3), 0, 400
    for run in range(runs):
        before = rng.normal(30, 3, 300)
        after = before + rng.exponential(2.0, 300)  # skewed, as losses of decibels are; truth: 2
        low, high = mean_estimate(after - before, seed=run).ci
        hits += low <= 2.0 <= high
    assert 0.93 <= hits / runs <= 0.97
    assert mean_estimate([]).to_dict() == {"value": None, "n": 0, "ci": [None, None]}
