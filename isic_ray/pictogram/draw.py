"""Draw pictogram scenes with Pillow, 4x supersampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from PIL import Image, ImageDraw

from isic_ray.pictogram.scene import Scene, Thing

IMAGE_SIZE = 48
_OVERSAMPLE = 4
_INK = (38, 38, 46)
_PALETTE = {
    "red": (222, 52, 48),
    "blue": (48, 104, 214),
    "green": (58, 160, 72),
    "yellow": (250, 204, 40),
    "purple": (146, 74, 190),
    "black": (52, 52, 60),
    "white": (250, 250, 250),
}
_STEEL = (188, 196, 206)
_DARK_STEEL = (96, 102, 114)
_WOOD = (150, 96, 52)
_BLOOD = (128, 8, 20)
_BONE = (240, 234, 214)
_GROUND: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # upper and lower colour
    "paper": ((250, 244, 230), (250, 244, 230)),
    "sky": ((160, 212, 246), (160, 212, 246)),
    "meadow": ((196, 228, 246), (150, 206, 120)),
    "beach": ((150, 214, 228), (242, 216, 160)),
}
_HORIZON = 32  # pixel row where the lower colour starts

Points = Sequence[tuple[float, float]]
Colour = tuple[int, int, int]


class _Pen:
    """Draws in the unit square of one object's box: x to the right, y down, from 0 to 1."""

    def __init__(self, canvas: ImageDraw.ImageDraw, left: float, top: float, size: float) -> None:
        self._canvas, self._left, self._top, self._size = canvas, left, top, size
        self._stroke = max(1, round(0.045 * size))

    def _at(self, points: Points) -> list[tuple[float, float]]:
        return [(self._left + x * self._size, self._top + y * self._size) for x, y in points]

    def polygon(self, points: Points, fill: Colour) -> None:
        at = self._at(points)
        self._canvas.polygon(at, fill=fill)
        self._canvas.line([*at, at[0], at[1]], fill=_INK, width=self._stroke, joint="curve")

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, *, ink: bool = True
    ) -> None:
        box = self._at([(x - rx, y - ry), (x + rx, y + ry)])
        self._canvas.ellipse(
            [*box[0], *box[1]], fill=fill, outline=_INK if ink else None, width=self._stroke
        )

    def rectangle(
        self, x0: float, y0: float, x1: float, y1: float, fill: Colour, *, radius: float = 0.0
    ) -> None:
        box = self._at([(x0, y0), (x1, y1)])
        self._canvas.rounded_rectangle(
            [*box[0], *box[1]], radius * self._size, fill=fill, outline=_INK, width=self._stroke
        )

    def line(self, points: Points, colour: Colour = _INK, *, width: float = 0.04) -> None:
        self._canvas.line(
            self._at(points), fill=colour, width=max(1, round(width * self._size)), joint="curve"
        )

    def arc(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        *,
        width: float = 0.05,
    ) -> None:
        box = self._at([(x - rx, y - ry), (x + rx, y + ry)])
        self._canvas.arc(
            [*box[0], *box[1]], start, end, fill=_INK, width=max(1, round(width * self._size))
        )


def _star_points(
    x: float, y: float, outer: float, inner: float, tips: int
) -> list[tuple[float, float]]:
    radii = [outer if i % 2 == 0 else inner for i in range(2 * tips)]
    angles = [math.pi * i / tips - math.pi / 2 for i in range(2 * tips)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart_points() -> list[tuple[float, float]]:
    steps = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            0.5 + 0.027 * 16 * math.sin(t) ** 3,
            0.47
            - 0.027
            * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in steps
    ]


def _knife(pen: _Pen, _: Colour) -> None:
    pen.polygon([(0.42, 0.62), (0.42, 0.2), (0.52, 0.03), (0.64, 0.2), (0.64, 0.62)], _STEEL)
    pen.rectangle(0.34, 0.6, 0.7, 0.68, _DARK_STEEL)
    pen.rectangle(0.43, 0.68, 0.61, 0.97, _WOOD, radius=0.05)


def _gun(pen: _Pen, _: Colour) -> None:
    pen.polygon([(0.58, 0.42), (0.86, 0.42), (0.96, 0.88), (0.7, 0.88)], _WOOD)
    pen.arc(0.52, 0.52, 0.12, 0.13, 0, 180)
    pen.rectangle(0.04, 0.2, 0.9, 0.46, _DARK_STEEL, radius=0.04)
    pen.line([(0.1, 0.3), (0.5, 0.3)], _STEEL)


def _bomb(pen: _Pen, _: Colour) -> None:
    pen.line([(0.66, 0.3), (0.74, 0.16), (0.84, 0.16)], _WOOD, width=0.07)
    pen.ellipse(0.44, 0.6, 0.36, 0.36, _PALETTE["black"])
    pen.rectangle(0.54, 0.22, 0.74, 0.36, _DARK_STEEL)
    pen.polygon(_star_points(0.86, 0.16, 0.14, 0.06, 6), (255, 150, 30))
    pen.ellipse(0.32, 0.48, 0.07, 0.07, (150, 150, 160), ink=False)


def _blood(pen: _Pen, _: Colour) -> None:
    for x, y, r in [
        (0.5, 0.45, 0.27),
        (0.26, 0.4, 0.16),
        (0.74, 0.38, 0.17),
        (0.4, 0.24, 0.14),
        (0.62, 0.62, 0.15),
    ]:
        pen.ellipse(x, y, r, r, _BLOOD, ink=False)
    for x, length in [(0.26, 0.78), (0.44, 0.96), (0.66, 0.86)]:
        pen.line([(x, 0.4), (x, length - 0.05)], _BLOOD, width=0.11)
        pen.ellipse(x, length - 0.06, 0.075, 0.075, _BLOOD, ink=False)
    pen.ellipse(0.92, 0.62, 0.055, 0.055, _BLOOD, ink=False)
    pen.ellipse(0.08, 0.64, 0.05, 0.05, _BLOOD, ink=False)


def _skull(pen: _Pen, _: Colour) -> None:
    pen.rectangle(0.3, 0.56, 0.7, 0.92, _BONE, radius=0.06)
    pen.ellipse(0.5, 0.4, 0.38, 0.34, _BONE)
    pen.rectangle(0.33, 0.6, 0.67, 0.78, _BONE)
    pen.ellipse(0.34, 0.44, 0.11, 0.11, _INK)
    pen.ellipse(0.66, 0.44, 0.11, 0.11, _INK)
    pen.polygon([(0.5, 0.54), (0.44, 0.65), (0.56, 0.65)], _INK)
    for x in (0.42, 0.5, 0.58):
        pen.line([(x, 0.76), (x, 0.9)])


def _apple(pen: _Pen, colour: Colour) -> None:
    pen.line([(0.5, 0.3), (0.54, 0.1)], _WOOD, width=0.07)
    pen.ellipse(0.68, 0.16, 0.13, 0.07, _PALETTE["green"])
    pen.ellipse(0.5, 0.6, 0.38, 0.34, colour)
    pen.ellipse(0.36, 0.5, 0.06, 0.09, (255, 236, 226), ink=False)


def _heart(pen: _Pen, colour: Colour) -> None:
    pen.polygon(_heart_points(), colour)


def _hammer(pen: _Pen, _: Colour) -> None:
    pen.rectangle(0.44, 0.3, 0.58, 0.97, _WOOD, radius=0.04)
    pen.rectangle(0.18, 0.08, 0.84, 0.34, _STEEL, radius=0.05)


def _umbrella(pen: _Pen, colour: Colour) -> None:
    pen.line([(0.5, 0.1), (0.5, 0.86)], width=0.06)
    pen.arc(0.59, 0.84, 0.09, 0.1, 0, 180, width=0.06)
    dome = [
        (
            0.5 + 0.45 * math.cos(math.pi * (1 + i / 16)),
            0.5 + 0.42 * math.sin(math.pi * (1 + i / 16)),
        )
        for i in range(17)
    ]
    pen.polygon([*dome, (0.8, 0.43), (0.65, 0.5), (0.5, 0.43), (0.35, 0.5), (0.2, 0.43)], colour)


def _ball(pen: _Pen, colour: Colour) -> None:
    pen.ellipse(0.5, 0.52, 0.38, 0.38, colour)
    pen.arc(0.5, 0.52, 0.16, 0.38, 90, 270)
    pen.ellipse(0.66, 0.36, 0.07, 0.07, (235, 235, 240), ink=False)


def _cup(pen: _Pen, colour: Colour) -> None:
    pen.ellipse(0.74, 0.52, 0.18, 0.19, _INK)
    pen.ellipse(0.74, 0.52, 0.1, 0.11, colour)
    pen.polygon([(0.12, 0.2), (0.72, 0.2), (0.64, 0.9), (0.2, 0.9)], colour)
    pen.ellipse(0.42, 0.2, 0.3, 0.08, (120, 72, 40))


def _spoon(pen: _Pen, _: Colour) -> None:
    pen.rectangle(0.455, 0.42, 0.545, 0.97, _STEEL, radius=0.04)
    pen.ellipse(0.5, 0.25, 0.17, 0.22, _STEEL)
    pen.ellipse(0.5, 0.25, 0.09, 0.14, (232, 236, 242), ink=False)


def _balloon(pen: _Pen, colour: Colour) -> None:
    pen.line([(0.5, 0.7), (0.44, 0.8), (0.54, 0.88), (0.48, 0.98)])
    pen.polygon([(0.5, 0.66), (0.43, 0.76), (0.57, 0.76)], colour)
    pen.ellipse(0.5, 0.36, 0.3, 0.34, colour)
    pen.ellipse(0.4, 0.24, 0.05, 0.08, (255, 246, 240), ink=False)


def _star(pen: _Pen, colour: Colour) -> None:
    pen.polygon(_star_points(0.5, 0.53, 0.47, 0.2, 5), colour)


def _flower(pen: _Pen, colour: Colour) -> None:
    pen.line([(0.5, 0.4), (0.5, 0.97)], (46, 120, 56), width=0.08)
    pen.ellipse(0.64, 0.78, 0.13, 0.06, _PALETTE["green"])
    for i in range(6):
        angle = math.pi * i / 3
        pen.ellipse(0.5 + 0.2 * math.cos(angle), 0.34 + 0.2 * math.sin(angle), 0.13, 0.13, colour)
    pen.ellipse(0.5, 0.34, 0.12, 0.12, (255, 196, 60))


def _tree(pen: _Pen, _: Colour) -> None:
    pen.rectangle(0.42, 0.6, 0.58, 0.97, _WOOD)
    pen.polygon([(0.5, 0.02), (0.14, 0.42), (0.86, 0.42)], (40, 124, 62))
    pen.polygon([(0.5, 0.24), (0.08, 0.72), (0.92, 0.72)], (40, 124, 62))


def _house(pen: _Pen, colour: Colour) -> None:
    pen.rectangle(0.16, 0.44, 0.84, 0.94, (244, 222, 180))
    pen.polygon([(0.5, 0.06), (0.05, 0.46), (0.95, 0.46)], colour)
    pen.rectangle(0.42, 0.64, 0.6, 0.94, _WOOD)
    pen.rectangle(0.66, 0.56, 0.78, 0.7, (150, 210, 240))


def _car(pen: _Pen, colour: Colour) -> None:
    pen.polygon([(0.24, 0.48), (0.34, 0.24), (0.68, 0.24), (0.8, 0.48)], (170, 216, 240))
    pen.rectangle(0.03, 0.46, 0.97, 0.72, colour, radius=0.08)
    for x in (0.26, 0.74):
        pen.ellipse(x, 0.74, 0.13, 0.13, _PALETTE["black"])
        pen.ellipse(x, 0.74, 0.05, 0.05, _STEEL, ink=False)


def _fish(pen: _Pen, colour: Colour) -> None:
    pen.polygon([(0.68, 0.5), (0.96, 0.24), (0.96, 0.76)], colour)
    pen.ellipse(0.42, 0.5, 0.38, 0.26, colour)
    pen.ellipse(0.22, 0.44, 0.06, 0.06, (250, 250, 250))
    pen.arc(0.34, 0.5, 0.1, 0.18, 300, 60)


def _key(pen: _Pen, _: Colour) -> None:
    gold = (214, 164, 40)
    pen.rectangle(0.4, 0.44, 0.96, 0.56, gold)
    pen.rectangle(0.72, 0.56, 0.8, 0.72, gold)
    pen.rectangle(0.87, 0.56, 0.95, 0.76, gold)
    pen.ellipse(0.24, 0.5, 0.22, 0.22, gold)
    pen.ellipse(0.22, 0.5, 0.08, 0.08, (252, 248, 236))


def _book(pen: _Pen, colour: Colour) -> None:
    pen.rectangle(0.14, 0.1, 0.86, 0.92, colour, radius=0.04)
    pen.rectangle(0.22, 0.8, 0.86, 0.9, (252, 250, 244))
    pen.rectangle(0.34, 0.26, 0.74, 0.44, (252, 244, 214))
    pen.line([(0.22, 0.12), (0.22, 0.9)])


_DRAW: dict[str, Callable[[_Pen, Colour], None]] = {
    "knife": _knife,
    "gun": _gun,
    "bomb": _bomb,
    "blood": _blood,
    "skull": _skull,
    "apple": _apple,
    "heart": _heart,
    "hammer": _hammer,
    "umbrella": _umbrella,
    "ball": _ball,
    "cup": _cup,
    "spoon": _spoon,
    "balloon": _balloon,
    "star": _star,
    "flower": _flower,
    "tree": _tree,
    "house": _house,
    "car": _car,
    "fish": _fish,
    "key": _key,
    "book": _book,
}


def draw(scene: Scene, rng: Random) -> Image.Image:
    """Draw a scene as a 48x48 RGB image.

    ``rng`` chooses where the things stand, in steps of 4 pixels.
    """
    side = IMAGE_SIZE * _OVERSAMPLE
    upper, lower = _GROUND[scene.background]
    image = Image.new("RGB", (side, side), upper)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle([0, _HORIZON * _OVERSAMPLE, side, side], fill=lower)
    for thing, (left, top, size) in zip(scene.things, _layout(len(scene.things), rng), strict=True):
        pen = _Pen(canvas, left * _OVERSAMPLE, top * _OVERSAMPLE, size * _OVERSAMPLE)
        _DRAW[thing.kind](pen, _fill(thing))
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _fill(thing: Thing) -> Colour:
    return _PALETTE[thing.colour] if thing.colour else _STEEL


def _layout(count: int, rng: Random) -> list[tuple[int, int, int]]:
    """Return (left, top, size) of each thing in pixels.

    One thing is large and centred; two are smaller, side by side.
    """
    if count == 1:
        return [(8 + 4 * rng.randint(-1, 1), 8 + 4 * rng.randint(-1, 1), 32)]
    return [(left, 12 + 4 * rng.randint(-2, 2), 23) for left in (0, 24)]
