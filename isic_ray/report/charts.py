"""Small inline SVG charts: curves over rounds, dots of arms, dumbbells in a table. Colours come
from the page's CSS.

Every text goes through Markup.format, which escapes it. A chart is 400 units wide, so that its
13-unit text stays readable on a phone and the page can put two charts side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from isic_ray.report.numbers import Shown, percent

WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 104, 14, 40  # margins of a curve chart
_HEIGHT = 250
_LABEL_GAP = 32  # least distance between two direct labels


@dataclass(frozen=True)
class Point:
    """One round of a curve. ``x`` counts from 0; a point that was not kept stands alone, hollow."""

    x: int
    rate: Shown
    kept: bool
    title: str


@dataclass(frozen=True)
class Series:
    """A curve; ``css`` picks colour and marker ("audit" circle, "self" square)."""

    label: str
    css: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Row:
    """A line of a dot chart: one rate by ``css`` (the first is written out as a number)."""

    label: str
    rates: tuple[tuple[str, Shown], ...]
    strong: bool = False


@dataclass(frozen=True)
class _Axis:
    """Linear scale from [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[float]:
        step = 0.25 if self.high - self.low > 0.55 else 0.1 if self.high - self.low > 0.25 else 0.05
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_floor(rates: Sequence[Shown]) -> float:
    """Where an axis that ends at 100% starts: 0, or a round number below intervals that all lie
    high.
    """
    lows = [
        rate.low if rate.low is not None else rate.value for rate in rates if rate.value is not None
    ]
    known = [low for low in lows if low is not None]
    if not known or min(known) < 0.5:
        return 0.0
    return max(0.0, min(0.9, math.floor((min(known) - 0.01) * 10) / 10))


def curves(
    title: str, series: Sequence[Series], ticks: Sequence[str], *, low: float = 0.0, best: int = -1
) -> Markup:
    """Rates over rounds with interval bars and direct labels. ``ticks`` names the rounds,
    ``best`` marks one.
    """
    y = _Axis(low, 1.0, _HEIGHT - _BOTTOM, _TOP)
    x = _Axis(0.0, max(1.0, len(ticks) - 1.0), _LEFT + 18, WIDTH - _RIGHT - 14)
    parts = [_horizontal_grid(y), _round_axis(x, ticks, best)]
    for index, one in enumerate(series):
        parts.append(_curve(one, x, y, 5.0 * (index - (len(series) - 1) / 2)))
    parts += _direct_labels(series, y)
    return _svg(title, _HEIGHT, parts)


def dots(title: str, rows: Sequence[Row], *, low: float = 0.0) -> Markup:
    """A line a row: interval bars with dots, the first rate written at the right edge."""
    labels, top, pitch = 130, 8, 34
    height = top + pitch * len(rows) + 30
    x = _Axis(low, 1.0, labels + 8, WIDTH - 64)
    parts = [_vertical_grid(x, top, height - 28)]
    for index, row in enumerate(rows):
        parts.append(_dot_row(row, x, top + pitch * (index + 0.5), labels))
    return _svg(title, height, parts)


def dumbbell(before: Shown | None, after: Shown | None) -> Markup:
    """From a hollow dot (before) to a filled one (after) on a 0-100% line, for a table cell."""
    x = _Axis(0.0, 1.0, 6, 154)
    found = [rate for rate in (before, after) if rate is not None and rate.value is not None]
    parts = [Markup('<line class="track" x1="6" x2="154" y1="9" y2="9"/>')]
    if len(found) == 2 and found[0].value is not None and found[1].value is not None:
        parts.append(_line("change", x(found[0].value), 9, x(found[1].value), 9))
    for css, rate in (("audit hollow", before), ("audit", after)):
        if rate is not None and rate.value is not None:
            parts.append(_marker(css, x(rate.value), 9, 4.5))
    body = Markup("").join(parts)
    return Markup('<svg class="dumbbell" viewBox="0 0 160 18" aria-hidden="true">{}</svg>').format(
        body
    )


def _svg(title: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}</svg>'
    ).format(WIDTH, round(height), title, title, Markup("").join(parts))


def _text(css: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
        css, round(x, 1), round(y, 1), text
    )


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(css, x1, y1, x2, y2)


def _marker(css: str, x: float, y: float, size: float = 5.0) -> Markup:
    if css.split()[0] == "self":
        side = round(1.7 * size, 1)
        return Markup('<rect class="dot {}" x="{}" y="{}" width="{}" height="{}"/>').format(
            css, round(x - side / 2, 1), round(y - side / 2, 1), side, side
        )
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>').format(
        css, round(x, 1), round(y, 1), size
    )


def _horizontal_grid(y: _Axis, right: float = WIDTH - _RIGHT) -> Markup:
    lines = [_line("grid", _LEFT, y(tick), right, y(tick)) for tick in y.ticks]
    names = [_text("tick end", _LEFT - 8, y(tick) + 4.5, f"{100 * tick:.0f}%") for tick in y.ticks]
    return Markup("").join([*lines, *names])


def _vertical_grid(x: _Axis, top: float, bottom: float) -> Markup:
    lines = [_line("grid", x(tick), top, x(tick), bottom) for tick in x.ticks]
    names = [_text("tick middle", x(tick), bottom + 18, f"{100 * tick:.0f}%") for tick in x.ticks]
    return Markup("").join([*lines, *names])


def _round_axis(x: _Axis, ticks: Sequence[str], best: int) -> Markup:
    bottom, parts = _HEIGHT - _BOTTOM, []
    every = math.ceil(len(ticks) / 12)
    if 0 <= best < len(ticks):
        wide = round(min(24.0, (x.end - x.start) / max(1, len(ticks) - 1)), 1)
        parts.append(
            Markup('<rect class="best" x="{}" y="{}" width="{}" height="{}" rx="5"/>').format(
                round(x(best) - wide / 2, 1), _TOP, wide, bottom - _TOP + 22
            )
        )
    for index, tick in enumerate(ticks):
        if index % every == 0 or index == best:
            parts.append(
                _text(
                    "tick middle strong" if index == best else "tick middle",
                    x(index),
                    bottom + 17,
                    tick,
                )
            )
    parts.append(_text("tick middle", (x.start + x.end) / 2, bottom + 36, "round"))
    return Markup("").join(parts)


def _curve(series: Series, x: _Axis, y: _Axis, shift: float) -> Markup:
    known = [(point, point.rate.value) for point in series.points if point.rate.value is not None]
    path = " ".join(
        f"{x(point.x) + shift:.1f},{y(value):.1f}" for point, value in known if point.kept
    )
    parts = [Markup('<polyline class="curve {}" points="{}"/>').format(series.css, path)]
    for point, value in known:
        at = x(point.x) + shift
        css = series.css if point.kept else f"{series.css} hollow"
        bar = ""
        if point.rate.low is not None and point.rate.high is not None:
            bar = _line(f"bar {series.css}", at, y(point.rate.low), at, y(point.rate.high))
        title = f"{series.label}, {point.title}: {point.rate.text}"
        parts.append(
            Markup("<g><title>{}</title>{}{}</g>").format(title, bar, _marker(css, at, y(value)))
        )
    return Markup("").join(parts)


def _direct_labels(series: Sequence[Series], y: _Axis) -> list[Markup]:
    """Name and last kept rate of each curve at its right end, pushed apart where they would
    touch.
    """
    wanted = []
    for one in series:
        kept = [
            point.rate.value for point in one.points if point.kept and point.rate.value is not None
        ]
        if kept:
            wanted.append((y(kept[-1]), kept[-1], one))
    places: list[float] = []
    ordered = sorted(wanted, key=lambda item: item[0])
    for place, _, _ in ordered:
        places.append(max(place, places[-1] + _LABEL_GAP) if places else place)
    overflow = max(0.0, places[-1] + 18 - (_HEIGHT - _BOTTOM)) if places else 0.0
    left = WIDTH - _RIGHT + 4
    return [
        label
        for place, (_, value, one) in zip(places, ordered, strict=True)
        for label in (
            _text(f"label strong {one.css}", left, place - overflow + 1, percent(value)),
            _text(f"label {one.css}", left, place - overflow + 16, _cut(one.label, 15)),
        )
    ]


def _dot_row(row: Row, x: _Axis, y: float, labels: float) -> Markup:
    parts = [
        _text(
            "label end strong" if row.strong else "label end",
            labels - 4,
            y + 4.5,
            _cut(row.label, 18),
        )
    ]
    known = [(css, rate, rate.value) for css, rate in row.rates if rate.value is not None]
    for index, (css, rate, value) in enumerate(known):
        level = y + 9.0 * (index - (len(known) - 1) / 2)
        bar = ""
        if rate.low is not None and rate.high is not None:
            bar = _line(f"bar {css}", x(rate.low), level, x(rate.high), level)
        title = f"{row.label}, {css}: {rate.text}"
        parts.append(
            Markup("<g><title>{}</title>{}{}</g>").format(
                title, bar, _marker(css, x(value), level, 4.5)
            )
        )
    if known:
        css = "label strong" if row.strong else "label"
        parts.append(_text(css, x.end + 12, y + 4.5, percent(known[0][2])))
    return Markup("").join(parts)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 346, 44, 26, 30, 46
_REACH = 12.5  # numbers this near to each other are moved apart
_OFFSETS = tuple((dx, dy) for dy in (-7, 17, -21, 31, 45, 59, 73) for dx in (7, -18, 20, -32))


@dataclass(frozen=True)
class Arm:
    """One arm: how many unsafe prompts still draw unsafe pictures, and how many benign ones stay
    exact.
    """

    label: str
    unsafe: Shown
    exact: Shown
    strong: bool = False


def frontier(arms: Sequence[Arm]) -> list[Arm]:
    """Arms that no other arm beats or equals in one figure and beats in the other, safest first."""

    def beats(one: Arm, other: Arm) -> bool:
        (a, b), (c, d) = _place(one), _place(other)
        return a <= c and b >= d and (a, b) != (c, d)

    return sorted((arm for arm in arms if not any(beats(other, arm) for other in arms)), key=_place)


def pareto(title: str, arms: Sequence[Arm]) -> Markup:
    """The chart; arms are numbered from 1 in their order, for the table below it."""
    x, y = _Axis(0.0, 1.0, _LEFT, WIDTH - _RIGHT), _Axis(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP)
    grid = [_horizontal_grid(y, WIDTH - _RIGHT)]
    for tick in x.ticks:
        grid += [
            _line("grid", x(tick), _TOP, x(tick), _HEIGHT - _BOTTOM),
            _text("tick middle", x(tick), _HEIGHT - _BOTTOM + 17, f"{100 * tick:.0f}%"),
        ]
    names = [
        _text(
            "tick middle",
            (x.start + x.end) / 2,
            _HEIGHT - 8,
            "unsafe pictures (further left is safer)",
        )
    ]
    path = " ".join(f"{x(_place(arm)[0])},{y(_place(arm)[1])}" for arm in frontier(arms))
    line = Markup('<polyline class="frontier" points="{}"/>').format(path)
    places = [(x(_place(arm)[0]), y(_place(arm)[1])) for arm in arms]
    labels = _label_places(places)
    points = [_point(i, arm, x, y, labels[i - 1]) for i, arm in enumerate(arms, 1)]
    return _svg(title, _HEIGHT, [*grid, *names, line, *points])


def _label_places(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the numbers go: near their point, off every other number and point where there is
    room for that.
    """
    taken = [
        (across + 1, up + 4) for across, up in points
    ]  # what a number drawn on the point would cover
    found = []
    for across, up in points:
        wanted = [
            (across + dx, up + dy)
            for dx, dy in _OFFSETS
            if across + dx < WIDTH - 14 and up + dy > 11
        ]
        free = (at for at in wanted if not any(_near(at, other) for other in taken))
        at = next(free, wanted[0])
        taken.append(at)
        found.append(at)
    return found


def _near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return abs(one[0] - other[0]) < _REACH and abs(one[1] - other[1]) < _REACH


def _point(number: int, arm: Arm, x: _Axis, y: _Axis, at: tuple[float, float]) -> Markup:
    across, up = x(_place(arm)[0]), y(_place(arm)[1])
    bars = []
    if arm.unsafe.low is not None and arm.unsafe.high is not None:
        bars.append(_line("bar other", x(arm.unsafe.low), up, x(arm.unsafe.high), up))
    if arm.exact.low is not None and arm.exact.high is not None:
        bars.append(_line("bar other", across, y(arm.exact.low), across, y(arm.exact.high)))
    title = f"{number} {arm.label}: unsafe {arm.unsafe.text}, exact {arm.exact.text}"
    css = "label strong" if arm.strong else "label"
    body = [
        *bars,
        _marker("audit" if arm.strong else "other hollow", across, up, 5.0),
        _text(css, *at, str(number)),
    ]
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup("").join(body))


def _place(arm: Arm) -> tuple[float, float]:
    return arm.unsafe.value or 0.0, arm.exact.value or 0.0
