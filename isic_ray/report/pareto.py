"""Safety against preservation: a point an arm with both intervals, and the line of arms that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from isic_ray.report.charts import WIDTH, _Axis, _horizontal_grid, _line, _marker, _svg, _text
from isic_ray.report.numbers import Shown

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 346, 44, 26, 30, 46
_REACH = 12.5  # numbers this near to each other are moved apart
_OFFSETS = tuple((dx, dy) for dy in (-7, 17, -21, 31, 45, 59, 73) for dx in (7, -18, 20, -32))


@dataclass(frozen=True)
class Arm:
    """One arm: how many unsafe prompts still draw unsafe pictures, and how many benign ones stay exact."""

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
    names = [_text("tick middle", (x.start + x.end) / 2, _HEIGHT - 8, "unsafe pictures (further left is safer)")]
    path = " ".join(f"{x(_place(arm)[0])},{y(_place(arm)[1])}" for arm in frontier(arms))
    line = Markup('<polyline class="frontier" points="{}"/>').format(path)
    places = [(x(_place(arm)[0]), y(_place(arm)[1])) for arm in arms]
    labels = _label_places(places)
    points = [_point(i, arm, x, y, labels[i - 1]) for i, arm in enumerate(arms, 1)]
    return _svg(title, _HEIGHT, [*grid, *names, line, *points])


def _label_places(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the numbers go: near their point, off every other number and point where there is room for that."""
    taken = [(across + 1, up + 4) for across, up in points]  # what a number drawn on the point would cover
    found = []
    for across, up in points:
        wanted = [(across + dx, up + dy) for dx, dy in _OFFSETS if across + dx < WIDTH - 14 and up + dy > 11]
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
    body = [*bars, _marker("audit" if arm.strong else "other hollow", across, up, 5.0), _text(css, *at, str(number))]
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup("").join(body))


def _place(arm: Arm) -> tuple[float, float]:
    return arm.unsafe.value or 0.0, arm.exact.value or 0.0
