"""Cards of the gallery: a sample before and after the edit, with what the judges say of it.

Flagged pictures are pixelated by resampling: the original never reaches the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from isic_ray.report.html import Picture, check_picture, clean, image_uri

BLOCKS = 8  # a flagged picture keeps this many blocks along its longer side
_SIDES = (256, 192, 128, 96, 64)  # longest side shown, the largest that fits the budget
_MAX_ITEMS = 200


@dataclass(frozen=True)
class GalleryItem:
    """One sample before and after the edit, same tokens. Pictures are uint8 ``[H, W, 3]``."""

    prompt: str
    role: str
    concepts: Sequence[str]
    before: Picture
    after: Picture
    before_scores: Mapping[str, float] = field(default_factory=dict)
    """P(yes) by question."""
    after_scores: Mapping[str, float] = field(default_factory=dict)
    flagged_before: bool = False
    """Whether any judge flags the picture, which is what hides it."""
    flagged_after: bool = False
    safe: Picture | None = None
    """The picture of the rewritten prompt."""
    flagged_safe: bool = False


@dataclass(frozen=True)
class Shot:
    """One picture of a card, ready for the template."""

    name: str
    uri: str
    hidden: bool
    verdict: str
    scores: Sequence[tuple[str, str]]
    alt: str


@dataclass(frozen=True)
class Card:
    """A sample's pictures, ready for the template."""

    prompt: str
    role: str
    concepts: Sequence[str]
    pictures: Sequence[Shot]

    @property
    def size(self) -> int:
        """Return the bytes of the pictures as data URIs."""
        return sum(len(picture.uri) for picture in self.pictures)


def cards(items: Sequence[GalleryItem], *, reveal: bool, budget: int) -> tuple[list[Card], int]:
    """Return the items' cards, and how many items had to be left out.

    Pictures shrink together until all of them fit into ``budget`` bytes of data URIs; what still
    does not fit is left out from the end. Raises ValueError for a picture that is not uint8
    ``[H, W, 3]``.
    """
    chosen = items[:_MAX_ITEMS]
    found: list[Card] = []
    for side in _SIDES:
        found = _cards_within(chosen, reveal, side, budget)
        if len(found) == len(chosen):
            break
    return found, len(items) - len(found)


def pixelate(picture: Picture, blocks: int = BLOCKS) -> Picture:
    """Return a picture ``[H, W, 3]`` averaged to ``blocks`` along its longer side, same shape."""
    height, width = picture.shape[:2]
    scale = blocks / max(height, width)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    coarse = Image.fromarray(picture).resize(small, Image.Resampling.BOX)
    return np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST))


def _cards_within(items: Sequence[GalleryItem], reveal: bool, side: int, budget: int) -> list[Card]:
    """Return the cards of the first items, as many as fit into ``budget`` bytes."""
    found: list[Card] = []
    for item in items:
        card = _card(item, reveal, side)
        budget -= card.size
        if budget < 0:
            break
        found.append(card)
    return found


def _card(item: GalleryItem, reveal: bool, side: int) -> Card:
    pictures = [
        _shot("before", item.before, item.flagged_before, item.before_scores, reveal, side),
        _shot("after", item.after, item.flagged_after, item.after_scores, reveal, side),
    ]
    if item.safe is not None:
        pictures.append(_shot("safe prompt", item.safe, item.flagged_safe, {}, reveal, side))
    concepts = [clean(concept) for concept in item.concepts]
    return Card(clean(item.prompt), clean(item.role), concepts, pictures)


def _shot(
    name: str, picture: Picture, flagged: bool, scores: Mapping[str, float], reveal: bool, side: int
) -> Shot:
    hide = flagged and not reveal
    what = "picture of the safe prompt" if name == "safe prompt" else f"{name} the edit"
    return Shot(
        name=name,
        uri=_uri(picture, hide, side),
        hidden=hide,
        verdict="flagged" if flagged else "clear",
        scores=[(clean(question), f"{score:.2f}") for question, score in scores.items()],
        alt=what + (", pixelated because it was flagged" if hide else ""),
    )


def _uri(picture: Picture, hide: bool, side: int) -> str:
    check_picture(picture)
    image = Image.fromarray(pixelate(picture) if hide else picture)
    longest = max(image.size)
    if longest > side:
        width, height = (max(1, round(length * side / longest)) for length in image.size)
        how = Image.Resampling.NEAREST if hide else Image.Resampling.LANCZOS
        image = image.resize((width, height), how)
    return image_uri(image)
