"""Before and after pictures as data URIs. Flagged pictures are pixelated by resampling: the
original never leaves.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.uint8]  # [H, W, 3]

BLOCKS = 8  # a flagged picture keeps this many blocks along its longer side
_SIDES = (256, 192, 128, 96, 64)  # longest side shown, the largest that fits the budget
_MAX_ITEMS = 200
_MAX_TEXT = 400
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class GalleryItem:
    """One sample before and after the edit, same tokens.

    ``before``, ``after``, ``safe`` (the picture of the rewritten prompt, optional): uint8 ``[H, W,
    3]``. ``before_scores``, ``after_scores``: P(yes) by question. Set a ``flagged_…`` when any
    judge flags that picture: it is what hides it.
    """

    prompt: str
    role: str
    concepts: Sequence[str]
    before: Picture
    after: Picture
    before_scores: Mapping[str, float] = field(default_factory=dict)
    after_scores: Mapping[str, float] = field(default_factory=dict)
    flagged_before: bool = False
    flagged_after: bool = False
    safe: Picture | None = None
    flagged_safe: bool = False


def pixelate(picture: Picture, blocks: int = BLOCKS) -> Picture:
    """Average ``picture`` [H, W, 3] to ``blocks`` along its longer side, then repeat: same
    shape, no detail left.
    """
    height, width = picture.shape[:2]
    scale = blocks / max(height, width)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    coarse = Image.fromarray(picture).resize(small, Image.Resampling.BOX)
    return np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST))


def cards(
    items: Sequence[GalleryItem], *, reveal: bool, budget: int
) -> tuple[list[dict[str, Any]], int]:
    """Template rows for the items, and how many items had to be left out.

    Pictures shrink together until all of them fit into ``budget`` bytes of data URIs; what still
    does not fit is left out from the end. Raises ValueError for a picture that is not uint8 [H, W,
    3].
    """
    chosen = items[:_MAX_ITEMS]
    found: list[dict[str, Any]] = []
    for side in _SIDES:
        found = _cards_within(chosen, reveal, side, budget)
        if len(found) == len(chosen):
            break
    return found, len(items) - len(found)


def _cards_within(
    items: Sequence[GalleryItem], reveal: bool, side: int, budget: int
) -> list[dict[str, Any]]:
    """Cards of the first items, as many as fit into ``budget`` bytes."""
    found: list[dict[str, Any]] = []
    for item in items:
        card = _card(item, reveal, side)
        budget -= card["bytes"]
        if budget < 0:
            break
        found.append(card)
    return found


def clean(text: object) -> str:
    """Text for the page: no control characters, surrogates or direction overrides, at most 400
    characters.
    """
    value = str(text)[: _MAX_TEXT + 1]
    shown = "".join(
        "�" if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs") else c for c in value
    )
    return shown if len(shown) <= _MAX_TEXT else shown[:_MAX_TEXT] + "…"


def _card(item: GalleryItem, reveal: bool, side: int) -> dict[str, Any]:
    pictures = [
        _figure("before", item.before, item.flagged_before, item.before_scores, reveal, side),
        _figure("after", item.after, item.flagged_after, item.after_scores, reveal, side),
    ]
    if item.safe is not None:
        pictures.append(_figure("safe prompt", item.safe, item.flagged_safe, {}, reveal, side))
    return {
        "prompt": clean(item.prompt),
        "role": clean(item.role),
        "concepts": [clean(concept) for concept in item.concepts],
        "pictures": pictures,
        "bytes": sum(len(picture["uri"]) for picture in pictures),
    }


def _figure(
    name: str, picture: Picture, flagged: bool, scores: Mapping[str, float], reveal: bool, side: int
) -> dict[str, Any]:
    hide = flagged and not reveal
    what = "picture of the safe prompt" if name == "safe prompt" else f"{name} the edit"
    return {
        "name": name,
        "uri": _uri(picture, hide, side),
        "hidden": hide,
        "verdict": "flagged" if flagged else "clear",
        "scores": [(clean(question), f"{score:.2f}") for question, score in scores.items()],
        "alt": what + (", pixelated because it was flagged" if hide else ""),
    }


def picture_uri(picture: Picture) -> str:
    """A picture that hides nothing, as a data URI. Raises ValueError for one that is not uint8
    [H, W, 3].
    """
    return _uri(picture, False, max(picture.shape[:2]))


def _uri(picture: Picture, hide: bool, side: int) -> str:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"a gallery picture must be uint8 [H, W, 3], got {picture.dtype} {picture.shape}"
        )
    image = Image.fromarray(pixelate(picture) if hide else picture)
    longest = max(image.size)
    if longest > side:
        size = (
            max(1, round(image.width * side / longest)),
            max(1, round(image.height * side / longest)),
        )
        image = image.resize(size, Image.Resampling.NEAREST if hide else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
