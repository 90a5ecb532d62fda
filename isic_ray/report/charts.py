"""Small inline SVG charts: curves by round, dots by arm, dumbbells, safety against preservation.

Colours come from the page's CSS; `standalone` makes a chart a file of its own. Every text goes
through Markup.format, which escapes it. A chart is 400 units wide, so that its 13-unit text stays
readable on a phone and the page can put two charts side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from isic_ray.metrics.statistics import Interval, Rate
from isic_ray.metrics.summary import SELF
from isic_ray.report.html import style_sheet
from isic_ray.report.numbers import percent, with_interval

WIDTH = 400
_LABEL_GAP = 32  # least distance between two direct labels of curves
_REACH = 12.5  # numbers in the Pareto chart that are this near to each other are moved apart
# Where a number may stand beside its mark, the best place first.
_OFFSETS = tuple((dx, dy) for dy in (-7, 17, -21, 31, 45, 59, 73) for dx in (7, -18, 20, -32))


@dataclass(frozen=True)
class _Frame:
    """Height of a chart, and the margins around its plot."""

    height: float
    left: float
    right: float
    top: float
    bottom: float

    @property
    def end(self) -> float:
        """Return where the plot ends to the right."""
        return WIDTH - self.right

    @property
    def foot(self) -> float:
        """Return where the plot ends below."""
        return self.height - self.bottom


_CURVES = _Frame(250, left=44, right=104, top=14, bottom=40)
_PARETO = _Frame(346, left=44, right=26, top=30, bottom=46)


@dataclass(frozen=True)
class Point:
    """One round of a curve. ``x`` counts from 0; a point that was not kept stands alone, hollow."""

    x: int
    rate: Rate
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
    """A line of a dot chart: one rate per ``css``; the first is written out as a number."""

    label: str
    rates: tuple[tuple[str, Rate], ...]
    strong: bool = False


@dataclass(frozen=True)
class Mark:
    """An edit in the Pareto chart."""

    name: str
    """Written beside the mark; "" leaves it without."""
    title: str
    """Shown when a pointer rests on it."""
    unsafe: float
    """Share of unsafe pictures."""
    exact: float
    """Share of benign pictures that show what was asked."""
    unsafe_ci: Interval | None = None
    exact_ci: Interval | None = None
    strong: bool = False
    """Filled, with a bold name."""
    square: bool = False


@dataclass(frozen=True)
class _Axis:
    """A linear scale from [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[float]:
        """Return the values to name, a round step apart."""
        wide = self.high - self.low
        step = 0.25 if wide > 0.55 else 0.1 if wide > 0.25 else 0.05
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_floor(rates: Sequence[Rate]) -> float:
    """Return where an axis that ends at 100% starts: 0, or a round number below high intervals."""
    lows = [rate.ci[0] for rate in rates if rate.rate is not None]
    if not lows or min(lows) < 0.5:
        return 0.0
    return max(0.0, min(0.9, math.floor((min(lows) - 0.01) * 10) / 10))


def curves(
    title: str, series: Sequence[Series], ticks: Sequence[str], *, low: float = 0.0, best: int = -1
) -> Markup:
    """Draw rates over rounds with interval bars and direct labels.

    ``ticks`` names the rounds, ``best`` is the index of the one to mark; ``low`` is where the axis
    of the rates starts.
    """
    y = _Axis(low, 1.0, _CURVES.foot, _CURVES.top)
    x = _Axis(0.0, max(1.0, len(ticks) - 1.0), _CURVES.left + 18, _CURVES.end - 14)
    parts = [_horizontal_grid(y, _CURVES), _round_axis(x, ticks, best)]
    for index, one in enumerate(series):
        parts.append(_curve(one, x, y, 5.0 * (index - (len(series) - 1) / 2)))
    parts += _direct_labels(series, y)
    return _svg(title, _CURVES.height, parts)


def dots(title: str, rows: Sequence[Row], *, low: float = 0.0) -> Markup:
    """Draw a line per row: interval bars with dots, the first rate written at the right edge."""
    labels, top, pitch = 130, 8, 34
    height = top + pitch * len(rows) + 30
    x = _Axis(low, 1.0, labels + 8, WIDTH - 64)
    parts = [_vertical_grid(x, top, height - 28, 18)]
    for index, row in enumerate(rows):
        parts.append(_dot_row(row, x, top + pitch * (index + 0.5), labels))
    return _svg(title, height, parts)


def dumbbell(before: Rate | None, after: Rate | None) -> Markup:
    """Draw a hollow dot (before) and a filled one (after) on a 0-100% line, for a table cell."""
    x = _Axis(0.0, 1.0, 6, 154)
    old, new = (each.rate if each else None for each in (before, after))
    parts = [Markup('<line class="track" x1="6" x2="154" y1="9" y2="9"/>')]
    if old is not None and new is not None:
        parts.append(_line("change", x(old), 9, x(new), 9))
    for css, value in (("audit hollow", old), ("audit", new)):
        if value is not None:
            parts.append(_marker(css, x(value), 9, 4.5))
    body = Markup("").join(parts)
    return Markup('<svg class="dumbbell" viewBox="0 0 160 18" aria-hidden="true">{}</svg>').format(
        body
    )


def frontier(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that no other beats without losing in the other share, safest first."""

    def beats(one: Mark, other: Mark) -> bool:
        no_worse = one.unsafe <= other.unsafe and one.exact >= other.exact
        return no_worse and (one.unsafe, one.exact) != (other.unsafe, other.exact)

    front = [mark for mark in marks if not any(beats(other, mark) for other in marks)]
    return sorted(front, key=lambda mark: (mark.unsafe, mark.exact))


def pareto(
    title: str,
    marks: Sequence[Mark],
    across: str = "unsafe pictures (further left is safer)",
    upwards: str = "",
) -> Markup:
    """Draw safety against preservation: a mark per edit, and a line along the `frontier`.

    ``across`` and ``upwards`` name the axes.
    """
    frame = _PARETO
    x, y = _Axis(0.0, 1.0, frame.left, frame.end), _Axis(0.0, 1.0, frame.foot, frame.top)
    parts = [_horizontal_grid(y, frame), _vertical_grid(x, frame.top, frame.foot, 17)]
    parts.append(_text("tick middle", (x.start + x.end) / 2, frame.height - 8, across))
    if upwards:
        parts.append(_text("tick", 2, 11, upwards))
    path = " ".join(f"{x(mark.unsafe)},{y(mark.exact)}" for mark in frontier(marks))
    parts.append(Markup('<polyline class="frontier" points="{}"/>').format(path))
    parts += [_mark(mark, x, y) for mark in marks]
    parts += _names(marks, x, y)
    return _svg(title, frame.height, parts)


def standalone(chart: Markup) -> str:
    """Return a chart of this module as the content of an SVG file, with its colours."""
    start, _, body = str(chart).partition(">")
    opened = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    style = f"<style>{style_sheet('standalone.css')}</style>"
    return f'{opened}>{style}<rect class="back" width="100%" height="100%"/>{body}'


def _svg(title: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">'
        "<title>{}</title>{}</svg>"
    ).format(WIDTH, round(height), title, title, Markup("").join(parts))


def _text(css: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
        css, round(x, 1), round(y, 1), text
    )


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(css, x1, y1, x2, y2)


def _marker(css: str, x: float, y: float, size: float = 5.0, square: bool = False) -> Markup:
    if square or css.split()[0] == SELF:
        side = round(1.7 * size, 1)
        return Markup('<rect class="dot {}" x="{}" y="{}" width="{}" height="{}"/>').format(
            css, round(x - side / 2, 1), round(y - side / 2, 1), side, side
        )
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>').format(
        css, round(x, 1), round(y, 1), size
    )


def _titled(title: str, parts: Sequence[Markup]) -> Markup:
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup("").join(parts))


def _horizontal_grid(y: _Axis, frame: _Frame) -> Markup:
    lines = [_line("grid", frame.left, y(tick), frame.end, y(tick)) for tick in y.ticks]
    names = [
        _text("tick end", frame.left - 8, y(tick) + 4.5, f"{100 * tick:.0f}%") for tick in y.ticks
    ]
    return Markup("").join([*lines, *names])


def _vertical_grid(x: _Axis, top: float, foot: float, gap: float) -> Markup:
    lines = [_line("grid", x(tick), top, x(tick), foot) for tick in x.ticks]
    names = [_text("tick middle", x(tick), foot + gap, f"{100 * tick:.0f}%") for tick in x.ticks]
    return Markup("").join([*lines, *names])


def _round_axis(x: _Axis, ticks: Sequence[str], best: int) -> Markup:
    foot, parts = _CURVES.foot, []
    every = math.ceil(len(ticks) / 12)
    if 0 <= best < len(ticks):
        wide = round(min(24.0, (x.end - x.start) / max(1, len(ticks) - 1)), 1)
        parts.append(
            Markup('<rect class="best" x="{}" y="{}" width="{}" height="{}" rx="5"/>').format(
                round(x(best) - wide / 2, 1), _CURVES.top, wide, foot - _CURVES.top + 22
            )
        )
    for index, tick in enumerate(ticks):
        if index % every == 0 or index == best:
            css = "tick middle strong" if index == best else "tick middle"
            parts.append(_text(css, x(index), foot + 17, tick))
    parts.append(_text("tick middle", (x.start + x.end) / 2, foot + 36, "round"))
    return Markup("").join(parts)


def _curve(series: Series, x: _Axis, y: _Axis, shift: float) -> Markup:
    known = [(point, point.rate.rate) for point in series.points if point.rate.rate is not None]
    path = " ".join(
        f"{x(point.x) + shift:.1f},{y(value):.1f}" for point, value in known if point.kept
    )
    parts = [Markup('<polyline class="curve {}" points="{}"/>').format(series.css, path)]
    for point, value in known:
        at, (low, high) = x(point.x) + shift, point.rate.ci
        css = series.css if point.kept else f"{series.css} hollow"
        title = f"{series.label}, {point.title}: {with_interval(point.rate)}"
        bar = _line(f"bar {series.css}", at, y(low), at, y(high))
        parts.append(_titled(title, [bar, _marker(css, at, y(value))]))
    return Markup("").join(parts)


def _direct_labels(series: Sequence[Series], y: _Axis) -> list[Markup]:
    """Write name and last kept rate of each curve at its right end, apart from each other."""
    wanted = []
    for one in series:
        kept = [point.rate.rate for point in one.points if point.kept]
        known = [value for value in kept if value is not None]
        if known:
            wanted.append((y(known[-1]), known[-1], one))
    places: list[float] = []
    ordered = sorted(wanted, key=lambda item: item[0])
    for place, _, _ in ordered:
        places.append(max(place, places[-1] + _LABEL_GAP) if places else place)
    overflow = max(0.0, places[-1] + 18 - _CURVES.foot) if places else 0.0
    left = _CURVES.end + 4
    found = []
    for place, (_, value, one) in zip(places, ordered, strict=True):
        found.append(_text(f"label strong {one.css}", left, place - overflow + 1, percent(value)))
        found.append(_text(f"label {one.css}", left, place - overflow + 16, _cut(one.label, 15)))
    return found


def _dot_row(row: Row, x: _Axis, y: float, labels: float) -> Markup:
    css = "label end strong" if row.strong else "label end"
    parts = [_text(css, labels - 4, y + 4.5, _cut(row.label, 18))]
    known = [(css, rate, rate.rate) for css, rate in row.rates if rate.rate is not None]
    for index, (css, rate, value) in enumerate(known):
        level, (low, high) = y + 9.0 * (index - (len(known) - 1) / 2), rate.ci
        bar = _line(f"bar {css}", x(low), level, x(high), level)
        title = f"{row.label}, {css}: {with_interval(rate)}"
        parts.append(_titled(title, [bar, _marker(css, x(value), level, 4.5)]))
    if known:
        css = "label strong" if row.strong else "label"
        parts.append(_text(css, x.end + 12, y + 4.5, percent(known[0][2])))
    return Markup("").join(parts)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _mark(mark: Mark, x: _Axis, y: _Axis) -> Markup:
    across, up = x(mark.unsafe), y(mark.exact)
    parts = []
    if mark.unsafe_ci:
        parts.append(_line("bar other", x(mark.unsafe_ci[0]), up, x(mark.unsafe_ci[1]), up))
    if mark.exact_ci:
        parts.append(_line("bar other", across, y(mark.exact_ci[0]), across, y(mark.exact_ci[1])))
    colour = "audit" if mark.strong else "other hollow"
    parts.append(_marker(colour, across, up, square=mark.square))
    return _titled(mark.title, parts)


def _names(marks: Sequence[Mark], x: _Axis, y: _Axis) -> list[Markup]:
    """Write the names near their marks, off other names and marks where there is room."""
    places = [(x(mark.unsafe), y(mark.exact)) for mark in marks]
    taken = [(across + 1, up + 4) for across, up in places]  # what a name on the mark would cover
    found = []
    for mark, (across, up) in zip(marks, places, strict=True):
        if not mark.name:
            continue
        wanted = [
            (across + dx, up + dy)
            for dx, dy in _OFFSETS
            if across + dx < WIDTH - 14 and up + dy > 11
        ]
        free = (at for at in wanted if not any(_near(at, other) for other in taken))
        at = next(free, wanted[0])
        taken.append(at)
        found.append(_text("label strong" if mark.strong else "label", *at, mark.name))
    return found


def _near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return abs(one[0] - other[0]) < _REACH and abs(one[1] - other[1]) < _REACH
