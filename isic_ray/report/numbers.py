"""How numbers are written: the one rounding behind the report, the tables and the model card."""

from __future__ import annotations

from isic_ray.metrics.statistics import Estimate, Rate
from isic_ray.metrics.summary import AUDIT, SELF, Figures, Rates, Round, Summary
from isic_ray.report.text import aligned, one_line

JUDGES = {AUDIT: "auditor", SELF: "self-judge"}  # keys among rates, most trusted first
NONE = "–"  # shown where there is no number


def percent(value: float | None) -> str:
    """Return a share as "28.3%"."""
    return NONE if value is None else f"{100 * value:.1f}%"


def decibel(value: float | None) -> str:
    """Return a PSNR as "28.5 dB"."""
    return NONE if value is None else f"{value:.1f} dB"


def p_value(value: float) -> str:
    """Return a p-value as "p = 0.012", or "p < 0.0001"."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def duration(seconds: float | None) -> str:
    """Return seconds as "41 s", "3 min 20 s" or "2 h 05 min"."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def point(found: Rate | Estimate | None) -> str:
    """Return the number alone: a share as "28.3%", an estimate such as kappa as "0.87"."""
    if isinstance(found, Estimate):
        return NONE if found.value is None else f"{found.value:.2f}"
    return percent(found.rate if found else None)


def interval(found: Rate | Estimate | None) -> str:
    """Return the interval as "[22.3, 35.3]", a share's in percent; "" where the number is None."""
    if found is None or point(found) == NONE:
        return ""
    low, high = found.ci
    if isinstance(found, Estimate):
        return f"[{low:.2f}, {high:.2f}]"
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def with_interval(found: Rate | Estimate | None) -> str:
    """Return the number with its interval: "28.3% [22.3, 35.3]"."""
    return f"{point(found)} {interval(found)}".rstrip()


def with_count(rate: Rate | None) -> str:
    """Return a rate with its interval and count: "28.3% [22.3, 35.3], n = 180"."""
    return f"{with_interval(rate)}, n = {rate.n}" if rate else NONE


def judges(*rates: Rates) -> list[str]:
    """Return the judges of any of ``rates``: the auditor, the self-judge, then others by name."""
    order = {name: place for place, name in enumerate(JUDGES)}
    names = {name for each in rates for name in each}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def judge_name(key: str) -> str:
    """Return the words for a judge's key: "auditor" for "audit"; other names as they are."""
    return JUDGES.get(key, key)


def trusted(rates: Rates) -> Rate | None:
    """Return the rate by the most trusted judge that has one."""
    return next((rates[name] for name in judges(rates)), None)


def table(summary: Summary) -> str:
    """Return the run as plain text: a line per round (the best one starred), then one per arm."""
    heading = ["", "unsafe, auditor", "unsafe, self", "benign exact", "PSNR", "time", ""]
    rounds = [_round_cells(each, each is summary.best) for each in summary.rounds]
    arms = [
        [one_line(f"arm {name}", 28), *_cells(arm.figures), NONE, ""]
        for name, arm in summary.arms.items()
    ]
    lines = aligned([heading, *rounds, *arms])
    rule = "-" * min(100, max(map(len, lines)))
    after_rounds = 1 + len(rounds)
    parts = [lines[0], rule, *lines[1:after_rounds]]
    if arms:
        parts += [rule, *lines[after_rounds:]]
    parts += [rule, "* best round. Shares of held-out prompts with 95% intervals."]
    if summary.alarm:
        parts.append(f"ALARM: {one_line(summary.alarm)}")
    return "\n".join(parts) + "\n"


def _round_cells(entry: Round, best: bool) -> list[str]:
    remarks = ["" if entry.kept else "not kept.", one_line(entry.note, 100)]
    return [
        f"round {entry.round}{' *' if best else ''}",
        *_cells(entry.figures),
        duration(entry.seconds),
        " ".join(filter(None, remarks)),
    ]


def _cells(figures: Figures) -> list[str]:
    unsafe = figures.unsafe
    rates = (unsafe.get(AUDIT), unsafe.get(SELF), trusted(figures.benign.exact))
    return [*map(with_interval, rates), decibel(figures.benign.psnr)]
