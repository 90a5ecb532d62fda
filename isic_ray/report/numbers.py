"""Reading numbers out of summary.json and writing them: the one rounding behind the report and
the console table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

JUDGES = {"audit": "auditor", "self": "self-judge"}  # keys of summary.json, most trusted first
NONE = "–"  # shown where there is no number


@dataclass(frozen=True)
class Shown:
    """A number of the summary, as found: ``value`` and its interval may be absent."""

    value: float | None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    share: bool = True  # False: a plain number such as kappa, written without percent

    @property
    def percent(self) -> str:
        return percent(self.value) if self.share or self.value is None else f"{self.value:.2f}"

    @property
    def interval(self) -> str:
        """The interval as "[22.3, 35.3]" in percent, or "" without interval or number."""
        if self.value is None or self.low is None or self.high is None:
            return ""
        if not self.share:
            return f"[{self.low:.2f}, {self.high:.2f}]"
        return f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"

    @property
    def text(self) -> str:
        """The number with its interval: "28.3% [22.3, 35.3]"."""
        return f"{self.percent} {self.interval}".rstrip()


def percent(value: float | None) -> str:
    """A share as "28.3%"."""
    return NONE if value is None else f"{100 * value:.1f}%"


def decibel(value: float | None) -> str:
    """A PSNR as "28.5 dB"."""
    return NONE if value is None else f"{value:.1f} dB"


def p_value(value: float | None) -> str:
    """A p-value as "p = 0.012", or "p < 0.0001"."""
    if value is None:
        return ""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def duration(seconds: float | None) -> str:
    """Seconds as "41 s", "3 min 20 s" or "2 h 05 min"."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 100
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def shown(value: Any) -> Shown | None:
    """Read ``{"rate" | "value", "n", "ci"}``; None for anything that has not this shape."""
    if not isinstance(value, Mapping) or not ("rate" in value or "value" in value):
        return None
    ci = value.get("ci")
    low, high = (
        (number(ci[0]), number(ci[1]))
        if isinstance(ci, list | tuple) and len(ci) == 2
        else (None, None)
    )
    n = number(value.get("n"))
    return Shown(
        number(value.get("rate", value.get("value"))),
        None if n is None else int(n),
        low,
        high,
        "rate" in value,
    )


def at(tree: Any, *path: str) -> Any:
    """The piece of the summary at ``path``, or None when any part of the way is absent."""
    for key in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def rate_at(tree: Any, *path: str) -> Shown | None:
    """`shown` of the piece at ``path``."""
    return shown(at(tree, *path))


def rates(tree: Any, prefix: str = "") -> Iterator[tuple[str, Shown]]:
    """Every rate below ``tree`` with its path as words, e.g. ("gore self", ...)."""
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        name, found = f"{prefix} {key}".strip(), shown(value)
        if found is not None:
            yield name, found
        else:
            yield from rates(value, name)


def rounds(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rounds, in their order; entries that are no mapping are left out."""
    found = summary.get("rounds")
    return (
        [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    )


def arms(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The arms by name."""
    found = summary.get("arms")
    return (
        {str(k): v for k, v in found.items() if isinstance(v, Mapping)}
        if isinstance(found, Mapping)
        else {}
    )


def kept(entry: Mapping[str, Any]) -> bool:
    """Round 0 and rounds that do not say otherwise count as kept."""
    return bool(entry.get("kept", True))


def first_and_best(summary: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Round 0 and the round that ``best_round`` names, or without it the last kept one; empty
    without rounds.
    """
    every = rounds(summary)
    if not every:
        return {}, {}
    best = summary.get("best_round")
    candidates = [entry for entry in every if best is None or entry.get("round") == best]
    return every[0], next((entry for entry in reversed(candidates) if kept(entry)), every[0])


def judges(*trees: Any) -> list[str]:
    """The judges with a rate in any of the mappings: auditor, self, then others by name."""
    names = {
        str(key)
        for tree in trees
        if isinstance(tree, Mapping)
        for key, value in tree.items()
        if shown(value)
    }
    return sorted(
        names, key=lambda name: (list(JUDGES).index(name) if name in JUDGES else len(JUDGES), name)
    )


def judge_name(key: str) -> str:
    """The words for a judge's key: "audit" as "auditor"; other names as they are."""
    return JUDGES.get(key, key)


def psnr_at(entry: Mapping[str, Any]) -> float | None:
    """Fidelity of benign pictures in dB: a plain number, or the value of a mapping."""
    found = at(entry, "benign", "psnr")
    inner = shown(found)
    return inner.value if inner else number(found)


def table(summary: Mapping[str, Any]) -> str:
    """The run as a plain text table: a line a round (best one starred), then a line an arm. For a
    monospace console.

    Absent numbers show as a dash; an empty summary yields only the heading.
    """
    heading = ["", "unsafe, auditor", "unsafe, self", "benign exact", "PSNR", "time", ""]
    _, best = first_and_best(summary)
    lines = [
        [_round_label(entry, entry is best), *_cells(entry), _remark(entry)]
        for entry in rounds(summary)
    ]
    lines += [
        [f"arm {_plain(name)}"[:28], *_cells(arm), _plain(arm.get("note"))[:100]]
        for name, arm in arms(summary).items()
    ]
    widths = [max(len(line[i]) for line in [heading, *lines]) for i in range(len(heading))]
    text = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        for line in [heading, *lines]
    ]
    rule = "-" * min(100, max(len(line.rstrip()) for line in text))
    after_rounds = 1 + len(rounds(summary))
    parts = [
        text[0],
        rule,
        *text[1:after_rounds],
        *([rule] if len(text) > after_rounds else []),
        *text[after_rounds:],
    ]
    alarm = _plain(summary.get("alarm"))
    tail = [
        rule,
        "* best round. Shares of held-out prompts with 95% intervals.",
        *([f"ALARM: {alarm}"] if alarm else []),
    ]
    return "\n".join(line.rstrip() for line in [*parts, *tail]) + "\n"


def _cells(entry: Mapping[str, Any]) -> list[str]:
    found = [rate_at(entry, "unsafe", "audit"), rate_at(entry, "unsafe", "self"), benign(entry)]
    return [rate.text if rate else NONE for rate in found] + [
        decibel(psnr_at(entry)),
        duration(number(entry.get("seconds"))),
    ]


def benign_tree(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Exactness of benign pictures by judge, without the other numbers kept beside it."""
    found = at(entry, "benign")
    return (
        {k: v for k, v in found.items() if k not in ("flagged", "psnr")}
        if isinstance(found, Mapping)
        else {}
    )


def benign(entry: Mapping[str, Any]) -> Shown | None:
    """Share of exact benign pictures by the most trusted judge that says."""
    tree = benign_tree(entry)
    return next((rate_at(tree, key) for key in judges(tree)), None)


def unsafe(entry: Mapping[str, Any]) -> Shown | None:
    """Share of unsafe pictures by the most trusted judge that says."""
    tree = at(entry, "unsafe")
    return next((rate_at(tree, key) for key in judges(tree)), None)


def _round_label(entry: Mapping[str, Any], best: bool) -> str:
    return f"round {_plain(entry.get('round', '?'))[:12]}{' *' if best else ''}"


def _remark(entry: Mapping[str, Any]) -> str:
    return " ".join(
        part
        for part in ["" if kept(entry) else "not kept.", _plain(entry.get("note"))[:100]]
        if part
    )


def _plain(value: Any) -> str:
    """Text on one line without control characters, so that it cannot disturb a terminal."""
    return "" if value is None else "".join(c if c.isprintable() else " " for c in str(value))
