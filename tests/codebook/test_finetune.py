"""Δ never re-enters the harmful space, and training it brings the safe pictures back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isic_ray.codebook.edit import project, renormalise
from isic_ray.codebook.finetune import (
    HarmlessDelta,
    harmful_component,
    harmless,
    loss,
    reconstruction,
    regulariser,
)
from isic_ray.codebook.space import random_space, rows

torch.set_num_threads(1)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=20, deadline=None)


class LinearRenderer(torch.nn.Module):
    """Decoder stand-in: each token's row times a frozen matrix gives its 2x2 patch."""

    def __init__(self, width: int, normalised: bool) -> None:
        super().__init__()
        self.normalised = normalised
        self.register_buffer(
            "paint", torch.randn(width, 12, generator=torch.Generator().manual_seed(9))
        )

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        return (rows(codebook, self.normalised)[tokens.long()] @ self.paint).reshape(
            len(tokens), 3, 2, -1
        )


def tables(seed: int, normalised: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    base = 2 * torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    basis = random_space(6, 2, seed)
    edited = project(base, basis, 1.0)
    return base, renormalise(edited, base) if normalised else edited, basis


@quick
@given(seeds, st.floats(1e-3, 10.0), st.booleans())
def test_the_table_stays_outside_the_harmful_space(
    seed: int, size: float, normalised: bool
) -> None:
    base, edited, basis = tables(seed, normalised)
    module = HarmlessDelta(edited, basis, normalised=normalised)
    module.delta.data = size * torch.randn(16, 6, generator=torch.Generator().manual_seed(seed + 1))
    assert harmful_component(module.delta, basis) < 1e-5
    assert float((module.table() @ basis).abs().max()) < 1e-5 * max(1.0, size)
    if normalised:
        torch.testing.assert_close(module.table().norm(dim=1), base.norm(dim=1))


def test_harmful_component_sees_a_basis_that_does_not_project() -> None:
    """The check is not vacuous: a basis spoilt on the way fails it."""
    delta, basis = torch.ones(4, 6), random_space(6, 2, 0)
    assert harmful_component(delta, 1.1 * basis) > 1e-2
    assert harmful_component(delta, None) == 0.0


@pytest.mark.parametrize("normalised", [False, True])
def test_only_masked_rows_move_and_still_rows_keep_their_bits(normalised: bool) -> None:
    _, edited, basis = tables(0, normalised)
    mask = torch.arange(16) < 5
    module = HarmlessDelta(edited, basis, mask, normalised)
    assert module.delta.shape == (5, 6)
    assert torch.equal(module.table(), edited)
    module.delta.data[:3] = 1.0
    table = module.table()
    assert torch.equal(table[3:], edited[3:])
    assert (table[:3] != edited[:3]).any(dim=1).all()
    torch.testing.assert_close(module(), table)
    if not normalised:
        torch.testing.assert_close(table[:3], edited[:3] + harmless(torch.ones(3, 6), basis))


def test_rows_of_zeros_do_not_break_normalised_families() -> None:
    edited = torch.randn(4, 6)
    edited[1] = 0.0
    module = HarmlessDelta(edited, None, normalised=True)
    module().square().sum().backward()
    assert module.delta.grad is not None
    assert module.delta.grad.isfinite().all()
    assert torch.equal(module.table(), edited)


def test_without_a_basis_delta_is_free_and_without_rows_it_is_empty() -> None:
    _, edited, _ = tables(0)
    module = HarmlessDelta(edited, None)
    module.delta.data += 1.0
    torch.testing.assert_close(module(), edited + 1.0)
    empty = HarmlessDelta(edited, None, torch.zeros(16).bool(), normalised=True)
    assert torch.equal(empty(), edited)
    assert float(regulariser(empty.movement(empty())).detach()) == 0.0


def test_losses() -> None:
    pixels, target = torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), 2.0)
    assert float(reconstruction(pixels, target)) == pytest.approx((2 + 4) / 2)
    assert float(regulariser(torch.ones(5, 6))) == pytest.approx(6.0)


def test_movement_is_harmless_delta() -> None:
    _, edited, basis = tables(0)
    module = HarmlessDelta(edited, basis, torch.arange(16) % 2 == 0)
    module.delta.data = torch.randn(8, 6)
    torch.testing.assert_close(
        module.movement(module()), harmless(module.delta, basis), atol=1e-5, rtol=0
    )


class Wrapper(torch.nn.Module):
    """What DeepSpeed and DDP do to a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        return self.module()  # type: ignore[no-any-return]


@pytest.mark.parametrize("normalised", [False, True])
def test_training_brings_safe_pictures_back(normalised: bool) -> None:
    """Safe pictures lie outside the harmful space, so Δ can restore what an edit broke."""
    _, edited, basis = tables(3, normalised)
    renderer = LinearRenderer(6, normalised)
    renderer.paint -= basis @ (basis.T @ renderer.paint)
    torch.manual_seed(0)
    broken = edited + 0.3 * harmless(torch.randn(16, 6), basis)
    tokens = torch.randint(16, (32, 4), dtype=torch.int32)
    target = renderer(tokens, edited)
    module = HarmlessDelta(broken, basis, normalised=normalised)
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.03, weight_decay=0.0)
    history = []
    for _ in range(60):
        optimiser.zero_grad()
        value = loss(renderer, Wrapper(module), tokens, target, weight=1e-4)
        value.backward()
        optimiser.step()
        history.append(float(value.detach()))
    assert history[-1] < 0.25 * history[0]
    assert harmful_component(module.delta, basis) < 1e-5
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["delta"]
    strict = loss(renderer, module, tokens, target, weight=1.0)
    assert float(strict.detach()) > history[-1]


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="basis"):
        HarmlessDelta(torch.zeros(4, 6), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="mask"):
        HarmlessDelta(torch.zeros(4, 6), None, torch.zeros(5).bool())
    with pytest.raises(TypeError, match="HarmlessDelta"):
        loss(
            LinearRenderer(6, False),
            Wrapper(torch.nn.Identity()),
            torch.zeros(1, 4),
            torch.zeros(1),
            0.0,
        )


def test_dear_rows_move_less() -> None:
    """Of two rows that would help as much, the dearer one stays nearer its place."""
    base = tables(3)[0]
    price = torch.ones(len(base))
    price[1] = 20.0
    module = HarmlessDelta(base, None, price=price)
    renderer = LinearRenderer(6, normalised=False)
    tokens = torch.tensor([[0, 1]])
    with torch.no_grad():
        target = renderer(tokens, base + 1.0)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        value = loss(renderer, module, tokens, target, 0.5)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    moved = (module.table() - base).norm(dim=1)
    assert moved[1] < 0.5 * moved[0]
    assert not moved[2:].any()


def test_the_regulariser_weighs_rows_by_price() -> None:
    movement = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert regulariser(movement).item() == 13.0
    assert regulariser(movement, torch.tensor([2.0, 10.0])).item() == 30.0
