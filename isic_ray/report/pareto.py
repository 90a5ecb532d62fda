"""Safety against preservation: a point an arm with both intervals, and the line of arms that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from isic_ray.report.charts import WIDTH, _Axis, _horizontal_grid, _line, _marker, _svg, _text
from isic_ray.report.numbers import Shown

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 330, 44, 14, 14, 46
_REACH = 11.0  # numbers this near to each other are moved apart


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
    taken: list[tuple[float, float]] = []
    points = []
    for number, arm in enumerate(arms, 1):
        points.append(_point(number, arm, x, y, taken))
    return _svg(title, _HEIGHT, [*grid, *names, line, *points])


def _point(number: int, arm: Arm, x: _Axis, y: _Axis, taken: list[tuple[float, float]]) -> Markup:
    across, up = x(_place(arm)[0]), y(_place(arm)[1])
    bars = []
    if arm.unsafe.low is not None and arm.unsafe.high is not None:
        bars.append(_line("bar other", x(arm.unsafe.low), up, x(arm.unsafe.high), up))
    if arm.exact.low is not None and arm.exact.high is not None:
        bars.append(_line("bar other", across, y(arm.exact.low), across, y(arm.exact.high)))
    at = (across + 9, up - 8)
    while any(abs(at[0] - other[0]) < _REACH and abs(at[1] - other[1]) < _REACH for other in taken):
        at = (at[0] + _REACH, at[1]) if at[0] < WIDTH - 30 else (across - 22, at[1] + _REACH)
    taken.append(at)
    title = f"{number} {arm.label}: unsafe {arm.unsafe.text}, exact {arm.exact.text}"
    css = "label strong" if arm.strong else "label"
    body = [*bars, _marker("audit" if arm.strong else "other hollow", across, up, 5.0), _text(css, *at, str(number))]
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup("").join(body))


def _place(arm: Arm) -> tuple[float, float]:
    return arm.unsafe.value or 0.0, arm.exact.value or 0.0
