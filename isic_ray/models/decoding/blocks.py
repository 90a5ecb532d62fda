"""Cut rows into blocks that run together, of equal widths, as large as a GPU holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_MIN_WIDTH = 16  # prompts are padded to this width, or to the next power of two


def blocks(lengths: Sequence[int], size: int, multiple: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Yield the padded width and the row indices of each block, at most ``size`` of them.

    ``lengths`` are the rows' own, which alone decide their width. A short block is filled up with
    its first row, to a multiple of ``multiple`` rows (0: to ``size``).
    """
    by_width: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_width.setdefault(max(_MIN_WIDTH, 1 << (length - 1).bit_length()), []).append(row)
    for width, rows in sorted(by_width.items()):
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            yield width, block + block[:1] * (-len(block) % (multiple or size))


def fitting_block(largest: int, sample_bytes: int, device: torch.device) -> int:
    """Return a power of two of samples whose caches take at most half of a GPU's memory.

    At most ``largest``; on a CPU just that. ``sample_bytes`` is what the cache of one sample takes.
    The GPU's total memory counts, not what is free, so that the size never varies.
    """
    block = largest
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        while block > 1 and block * sample_bytes > total / 2:
            block //= 2
    return block


def left_pad(
    prompts: Sequence[Sequence[int]], width: int, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ids ``[R,width]`` with padding in front, and its lengths ``[R]``; both int64."""
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[pad_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(pads, device=device)


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether ``error`` says that an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
