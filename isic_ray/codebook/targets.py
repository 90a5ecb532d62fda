"""What target tokens look like: computed once each, since training meets every target again and
again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from isic_ray.models.base import Perceiver, Renderer

_BLOCK = 4  # targets that are computed together
_MEMORY = 2**30  # bytes of results that are kept


class Targets:
    """Pictures of tokens under the table ``base`` ``[K,d]``, or with a ``perceiver`` its features
    of them.

    Results are computed in blocks of one size: kernels round by batch size, and a target must be
    the same to the bit whether it was kept or not, so that a resumed training ends where an
    unbroken one does. ``memory`` is in bytes.
    """

    def __init__(
        self,
        renderer: Renderer,
        base: Tensor,
        perceiver: Perceiver | None = None,
        memory: int = _MEMORY,
    ) -> None:
        self._renderer, self._base, self._perceiver = renderer, base, perceiver
        self._room, self._kept = memory, dict[bytes, Tensor]()

    def __call__(self, tokens: Tensor) -> Tensor:
        """Pixels ``[B,3,H,W]`` in about [-1, 1], or features ``[B,M,h]``, of tokens int64
        ``[B,N]``; no gradient.
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
            rows = torch.arange(start, start + _BLOCK).clamp_max(
                len(tokens) - 1
            )  # a short block repeats its last row
            pixels = self._renderer(tokens[rows], self._base)
            block = pixels if self._perceiver is None else self._perceiver(pixels)
            results += block[: len(tokens) - start].unbind()
        return results

    def _keep(self, found: dict[bytes, Tensor]) -> None:
        for key, result in found.items():
            size = result.numel() * result.element_size()
            if size > self._room:
                return
            self._room -= size
            self._kept[key] = result.clone()  # not the view, which would hold its whole block
