"""How rows are cut into blocks that run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_MIN_WIDTH = 16  # prompts are padded to this width, or to the next power of two


def blocks(lengths: Sequence[int], size: int, multiple: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Group rows by padded prompt width into blocks of at most ``size`` row indices.

    A short block is filled up with its first row, to a multiple of ``multiple`` rows; 0 means to
    ``size``.
    """
    by_width: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_width.setdefault(max(_MIN_WIDTH, 1 << (length - 1).bit_length()), []).append(row)
    for width, rows in sorted(by_width.items()):
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            yield width, block + block[:1] * (-len(block) % (multiple or size))


def left_pad(
    prompts: Sequence[Sequence[int]], width: int, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids ``[R,width]`` with padding in front, and its length ``[R]``; both int64."""
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[pad_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(pads, device=device)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised ``error`` because an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
