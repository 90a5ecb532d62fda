"""Δ in the harmless space: E″ = E′ + m ⊙ Δ (I - V Vᵀ), trained to draw safe tokens as before.

Only the parametrisation and the losses live here; the training loop is in
`isic_ray.execution.training`.

Shapes: K rows of the codebook, d their width, R rows that Δ may move, k dimensions of the harmful
space V, B pictures, N tokens per picture, M positions and h numbers per position of a picture's
features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isic_ray.codebook.targets import Perceive, Render

_SHORTEST = 1e-6  # keeps the gradient of a unit row finite


def harmless(delta: Tensor, basis: Tensor | None) -> Tensor:
    """Return Δ (I - V Vᵀ) ``[R,d]``: the part of Δ ``[R,d]`` outside the harmful space V ``[d,k]``.

    Without a harmful space (None) that is all of Δ.
    """
    return delta if basis is None else delta - (delta @ basis) @ basis.T


def harmful_component(delta: Tensor, basis: Tensor | None) -> float:
    """Return the largest row norm of Δ (I - V Vᵀ) V: 0 in exact arithmetic.

    It is checked to be below 1e-5 after training.
    """
    if basis is None or delta.numel() == 0:
        return 0.0
    return float((harmless(delta.detach(), basis) @ basis).norm(dim=1).max())


class HarmlessDelta(nn.Module):
    """The trainable table: ``forward() -> E″ [K,d]`` float32, with the one parameter Δ ``[R,d]``.

    Args: ``edited`` E′ ``[K,d]``; ``basis`` V ``[d,k]`` or None for no projection; ``trainable``
    bool ``[K]``, the mask m of rows that Δ may move (None: all); ``normalised`` if the family
    ignores norms; ``price`` ``[K]``, what moving each row costs in `regulariser` (None: 1 each).

    In normalised families Δ moves unit rows, and each sum is scaled back to the norm of its row of
    E′: the learning rate then means the same whatever the norms, and no step is lost on a direction
    that decoding ignores. Rows of zeros have no direction and stay. Rows outside the mask keep
    their exact bits. Raises ValueError when shapes disagree.
    """

    edited: Tensor  # E′ [K,d] float32
    basis: Tensor | None  # V [d,k]
    moved: Tensor  # [R] int64, the rows that Δ moves
    scale: Tensor  # [R,1], the unit of Δ: 1, or the norms of the moved rows
    price: Tensor  # [R]

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
        if trainable is None:
            moved = torch.arange(size, device=edited.device)
        else:
            moved = trainable.nonzero().flatten()
        scale = edited.new_ones(len(moved), 1)
        if normalised:
            moved = moved[edited[moved].any(dim=1)]  # a zero row has no direction to turn
            scale = edited[moved].norm(dim=1, keepdim=True)
        prices = scale.new_ones(len(moved)) if price is None else price.to(scale)[moved]
        self.normalised = normalised
        self.delta = nn.Parameter(torch.zeros(len(moved), width, device=edited.device))
        self.register_buffer("edited", edited)
        self.register_buffer("basis", None if basis is None else basis.detach().to(edited))
        self.register_buffer("moved", moved)
        self.register_buffer("scale", scale)
        self.register_buffer("price", prices)

    def forward(self) -> Tensor:
        """Return E″ ``[K,d]``, differentiable in Δ."""
        after = self.edited[self.moved] / self.scale + harmless(self.delta, self.basis)
        if self.normalised:
            after = after / after.norm(dim=1, keepdim=True).clamp(min=_SHORTEST)
        return self.edited.index_copy(0, self.moved, after * self.scale)

    def movement(self, codebook: Tensor) -> Tensor:
        """Return how far each trainable row went ``[R,d]``: E″ - E′ in units of `scale`.

        It is zero where Δ is zero, and read from `forward`'s result ``codebook`` rather than from
        Δ, so it also holds where ZeRO-3 has scattered the parameter.
        """
        return (codebook - self.edited)[self.moved] / self.scale

    @torch.no_grad()
    def table(self) -> Tensor:
        """Return the final E″ ``[K,d]``, detached, on CPU.

        Rows that Δ left alone have the exact bits of E′.
        """
        table = self.forward()
        still = self.moved[(harmless(self.delta, self.basis) == 0).all(dim=1)]
        table[still] = self.edited[still]
        return table.cpu()


def reconstruction(pixels: Tensor, target: Tensor) -> Tensor:
    """Return the mean of L1 and L2 between pictures ``[B,3,H,W]``.

    L1 keeps edges sharp, L2 punishes the worst pixels.
    """
    difference = pixels.float() - target.float()
    return 0.5 * (difference.abs().mean() + difference.square().mean())


def regulariser(movement: Tensor, price: Tensor | None = None) -> Tensor:
    """Return Σ_r price_r ‖movement_r‖² / R of a movement ``[R,d]``; 0 when R is 0.

    ``price`` is ``[R]`` (None: 1 each). With prices of 1 that is ‖Δ (I - V Vᵀ)‖² / R.
    """
    squares = movement.square().sum(dim=1)
    return (squares if price is None else price * squares).sum() / max(1, len(movement))


def feature_difference(seen: Tensor, wanted: Tensor) -> Tensor:
    """Return ‖seen - wanted‖² / ‖wanted‖² of features ``[B,M,h]``.

    It is relative, so that models whose features have other scales compare.
    """
    return (seen.float() - wanted.float()).square().mean() / wanted.float().square().mean()


def loss(
    render: Render,
    delta_module: nn.Module,
    tokens: Tensor,
    wanted: Tensor,
    weight: float,
    perceive: Perceive | None = None,
) -> Tensor:
    """Return how far the pictures of ``tokens`` ``[B,N]`` are from what is wanted, a scalar.

    The distance is `reconstruction` from the pixels ``wanted`` ``[B,3,H,W]``, or with ``perceive``
    the `feature_difference` of what it sees from the features ``wanted`` ``[B,M,h]``; ``weight``
    times `regulariser` is added. ``delta_module`` is a `HarmlessDelta`, or a wrapper (DeepSpeed
    engine, DDP) with one as its ``module``. Raises TypeError for any other module.
    """
    inner = delta_module if isinstance(delta_module, HarmlessDelta) else delta_module.module
    if not isinstance(inner, HarmlessDelta):
        raise TypeError(
            f"expected a HarmlessDelta or a wrapper around one, got {type(delta_module).__name__}"
        )
    codebook = delta_module()
    pixels = render(tokens, codebook)
    if perceive is None:
        distance = reconstruction(pixels, wanted)
    else:
        distance = feature_difference(perceive(pixels), wanted)
    return distance + weight * regulariser(inner.movement(codebook), inner.price)
