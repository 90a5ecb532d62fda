"""Δ in the harmless space: E″ = E′ + m ⊙ Δ (I - V Vᵀ), trained so that safe tokens are drawn as
before.

Only the parametrisation and the losses live here; the training loop is in
`isic_ray.execution.training`. Letters: K rows, d their width, R rows that Δ may move, B pictures, N
tokens a picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from isic_ray.models.base import Perceiver, Renderer

_SHORTEST = 1e-6  # keeps the gradient of a unit row finite


def harmless(delta: Tensor, basis: Tensor | None) -> Tensor:
    """Δ (I - V Vᵀ) ``[R,d]``: what is left of Δ ``[R,d]`` outside the harmful space V ``[d,k]``
    (None: all of it).
    """
    return delta if basis is None else delta - (delta @ basis) @ basis.T


def harmful_component(delta: Tensor, basis: Tensor | None) -> float:
    """The largest row norm of Δ (I - V Vᵀ) V: 0 in exact arithmetic, and checked to be below
    1e-5 after training.
    """
    if basis is None or delta.numel() == 0:
        return 0.0
    return float((harmless(delta.detach(), basis) @ basis).norm(dim=1).max())


class HarmlessDelta(nn.Module):
    """The trainable table: ``forward() -> E″ [K,d]`` float32, with the one parameter ``delta`` Δ
    ``[R,d]``.

    Args: ``edited`` E′ ``[K,d]``; ``basis`` V ``[d,k]`` or None for no projection; ``trainable``
    bool ``[K]``, the mask m of rows that Δ may move (None: all); ``normalised`` if the family
    ignores norms; ``price`` ``[K]``, what moving each row costs in `regulariser` (None: 1 each).

    In normalised families Δ moves unit rows, and each sum is scaled back to the norm of its row of
    E′: the learning rate then means the same whatever the norms, and no step is lost on a direction
    that decoding ignores. Rows of zeros have no direction and stay. Rows outside the mask keep
    their exact bits. Raises ValueError when shapes disagree.
    """

    edited: Tensor
    basis: Tensor | None
    moved: Tensor
    scale: Tensor
    price: Tensor

    def __init__(
        self,
        edited: Tensor,
        basis: Tensor | None,
        trainable: Tensor | None = None,
        normalised: bool = False,
        price: Tensor | None = None,
    ) -> None:
        super().__init__()
        size, width = edited.shape
        if basis is not None and basis.shape[0] != width:
            raise ValueError(f"basis of {basis.shape[0]} dimensions for rows of {width}")
        if trainable is not None and trainable.shape != (size,):
            raise ValueError(f"mask of shape {list(trainable.shape)} for {size} rows")
        edited = edited.detach().float().clone()
        moved = (
            torch.arange(size, device=edited.device)
            if trainable is None
            else trainable.nonzero().flatten()
        )
        scale = edited.new_ones(len(moved), 1)
        if normalised:
            moved = moved[edited[moved].any(dim=1)]  # a zero row has no direction to turn
            scale = edited[moved].norm(dim=1, keepdim=True)
        self.normalised = normalised
        self.delta = nn.Parameter(torch.zeros(len(moved), width, device=edited.device))
        self.register_buffer("edited", edited)
        self.register_buffer("basis", None if basis is None else basis.detach().to(edited))
        self.register_buffer("moved", moved)  # [R] int64
        self.register_buffer("scale", scale)  # [R,1]
        self.register_buffer(
            "price", scale.new_ones(len(moved)) if price is None else price.to(scale)[moved]
        )  # [R]

    def forward(self) -> Tensor:
        """E″ ``[K,d]``, differentiable in Δ."""
        after = self.edited[self.moved] / self.scale + harmless(self.delta, self.basis)
        if self.normalised:
            after = after / after.norm(dim=1, keepdim=True).clamp(min=_SHORTEST)
        return self.edited.index_copy(0, self.moved, after * self.scale)

    def movement(self, codebook: Tensor) -> Tensor:
        """How far each trainable row went ``[R,d]``, E″ - E′ in units of `scale`; zero where Δ is
        zero.

        Read from `forward`'s result rather than from Δ, so it also holds where ZeRO-3 has scattered
        the parameter.
        """
        return (codebook - self.edited)[self.moved] / self.scale

    @torch.no_grad()
    def table(self) -> Tensor:
        """The final E″ ``[K,d]``, detached, on CPU; rows that Δ left alone have the exact bits
        of E′.
        """
        table, still = (
            self.forward(),
            self.moved[(harmless(self.delta, self.basis) == 0).all(dim=1)],
        )
        table[still] = self.edited[still]
        return table.cpu()


def reconstruction(pixels: Tensor, target: Tensor) -> Tensor:
    """Mean of L1 and L2 between pictures ``[B,3,H,W]``: L1 keeps edges sharp, L2 punishes the
    worst pixels.
    """
    difference = pixels.float() - target.float()
    return 0.5 * (difference.abs().mean() + difference.square().mean())


def regulariser(movement: Tensor, price: Tensor | None = None) -> Tensor:
    """Σ_r price_r ‖movement_r‖² / R of a movement ``[R,d]`` and prices ``[R]`` (None: 1 each); 0
    when R is 0.

    With prices of 1 that is ‖Δ (I - V Vᵀ)‖² / R.
    """
    squares = movement.square().sum(dim=1)
    return (squares if price is None else price * squares).sum() / max(1, len(movement))


def feature_difference(seen: Tensor, wanted: Tensor) -> Tensor:
    """‖seen - wanted‖² / ‖wanted‖² of features ``[B,M,h]``: relative, so that models with other
    scales compare.
    """
    return (seen.float() - wanted.float()).square().mean() / wanted.float().square().mean()


def loss(
    renderer: Renderer,
    delta_module: nn.Module,
    tokens: Tensor,
    wanted: Tensor,
    weight: float,
    perceiver: Perceiver | None = None,
) -> Tensor:
    """Scalar: how far the pictures of ``tokens`` ``[B,N]`` are from what is wanted, plus weight ·
    regulariser.

    The distance is `reconstruction` from the pixels ``wanted`` ``[B,3,H,W]``, or with a
    ``perceiver`` the `feature_difference` of what it sees from the features ``wanted`` ``[B,M,h]``.
    ``delta_module`` is a `HarmlessDelta`, or a wrapper (DeepSpeed engine, DDP) with one as its
    ``module``.
    """
    inner = delta_module if isinstance(delta_module, HarmlessDelta) else delta_module.module
    if not isinstance(inner, HarmlessDelta):
        raise TypeError(
            f"expected a HarmlessDelta or a wrapper around one, got {type(delta_module).__name__}"
        )
    codebook = delta_module()
    pixels = renderer(tokens, codebook)
    distance = (
        reconstruction(pixels, wanted)
        if perceiver is None
        else feature_difference(perceiver(pixels), wanted)
    )
    return distance + weight * regulariser(inner.movement(codebook), inner.price)
