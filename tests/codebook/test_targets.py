"""A kept target is the target computed again, to the bit; memory stays in its bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isic_ray.codebook.targets import Render, Targets
from isic_ray.config.run import ModelConfig
from isic_ray.models.base import SeesPixels, UnifiedModel
from isic_ray.models.registry import load_model


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    torch.set_num_threads(1)
    return load_model(ModelConfig())


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(1024, (count, 36), generator=torch.Generator().manual_seed(seed))


class Counting:
    """Counts the pictures that it renders."""

    def __init__(self, inner: Render) -> None:
        self.inner, self.count = inner, 0

    def __call__(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        self.count += len(tokens)
        return self.inner(tokens, codebook)


@pytest.mark.parametrize("features", [False, True])
def test_kept_targets_equal_new_ones_whatever_they_were_asked_with(
    model: UnifiedModel, features: bool
) -> None:
    assert isinstance(model, SeesPixels)
    renderer, perceiver = model.renderer(), model.perceiver() if features else None
    warm = Targets(renderer, model.codebook, perceiver)
    rows = tokens(11)
    warm(rows[[3, 9, 4]])
    warm(rows[:7])
    alone = torch.cat([Targets(renderer, model.codebook, perceiver)(row[None]) for row in rows])
    assert torch.equal(warm(rows), alone)
    pixels = renderer(rows, model.codebook)
    torch.testing.assert_close(
        alone, perceiver(pixels) if perceiver else pixels, rtol=1e-4, atol=1e-4
    )


def test_each_target_is_rendered_once(model: UnifiedModel) -> None:
    renderer = Counting(model.renderer())
    targets, rows = Targets(renderer, model.codebook), tokens(8)
    first = targets(torch.cat([rows, rows[:4]]))
    assert renderer.count == 8
    assert torch.equal(targets(rows.flip(0)), first[:8].flip(0))
    assert renderer.count == 8


def test_what_does_not_fit_is_computed_again(model: UnifiedModel) -> None:
    renderer, rows = Counting(model.renderer()), tokens(8)
    picture = 3 * 48 * 48 * 4
    targets = Targets(renderer, model.codebook, memory=5 * picture)
    first = targets(rows)
    assert torch.equal(targets(rows), first)
    assert renderer.count == 8 + 4  # three of them, in a block of four
