"""Text for a monospace console: one line, aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(text: str, most: int | None = None) -> str:
    """Return the text on one line, without control characters and cut after ``most`` characters."""
    return "".join(c if c.isprintable() else " " for c in text)[:most]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return each line's cells, padded so that columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
