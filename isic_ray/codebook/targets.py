"""What target tokens look like: each target is computed once, since training meets it repeatedly.

Shapes: K rows of the codebook, d their width, B targets, N tokens per picture, M positions and h
numbers per position of a picture's features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Differentiable drawing: tokens int64 [B,N], table [K,d] -> pixels [B,3,H,W] in about [-1, 1].
# Gradients flow to the table only.
Render = Callable[[Tensor, Tensor], Tensor]
# Differentiable seeing: pixels [B,3,H,W] in about [-1, 1] -> features [B,M,h].
Perceive = Callable[[Tensor], Tensor]

_BLOCK = 4  # targets that are computed together
_MEMORY = 2**30  # bytes of results that are kept


class Targets:
    """Pictures of tokens under the table ``base`` ``[K,d]``, or with ``perceive`` their features.

    Results are computed in blocks of one size: kernels round by batch size, and a target must be
    the same to the bit whether it was kept or not, so that a resumed training ends where an
    unbroken one does. ``memory`` is in bytes.
    """

    def __init__(
        self,
        render: Render,
        base: Tensor,
        perceive: Perceive | None = None,
        memory: int = _MEMORY,
    ) -> None:
        self._render, self._base, self._perceive = render, base, perceive
        self._room = memory
        self._kept: dict[bytes, Tensor] = {}

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the pixels ``[B,3,H,W]`` or features ``[B,M,h]`` of tokens int64 ``[B,N]``.

        They carry no gradient.
        """
        keys = [row.tobytes() for row in tokens.cpu().numpy()]
        lacking = {key: index for index, key in enumerate(keys) if key not in self._kept}
        found = dict(zip(lacking, self._compute(tokens[list(lacking.values())]), strict=True))
        wanted = torch.stack([found[key] if key in found else self._kept[key] for key in keys])
        self._keep(found)
        return wanted

    @torch.no_grad()
    def _compute(self, tokens: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for start in range(0, len(tokens), _BLOCK):
            # A short block repeats its last row.
            rows = torch.arange(start, start + _BLOCK).clamp_max(len(tokens) - 1)
            pixels = self._render(tokens[rows], self._base)
            block = pixels if self._perceive is None else self._perceive(pixels)
            results += block[: len(tokens) - start].unbind()
        return results

    def _keep(self, found: dict[bytes, Tensor]) -> None:
        for key, result in found.items():
            size = result.numel() * result.element_size()
            if size > self._room:
                return
            self._room -= size
            self._kept[key] = result.clone()  # not the view, which would hold its whole block
