"""The report of a run as one self-contained HTML page.

It quotes the run's `Summary`, and what `isic evaluate` measured where it did. The page loads
nothing, runs no script, and its content security policy says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from isic_ray.metrics.statistics import Estimate, Rate
from isic_ray.metrics.summary import AUDIT, SELF, Figures, Rates, Round, Summary
from isic_ray.report import charts, story
from isic_ray.report.cards import Card, GalleryItem, cards
from isic_ray.report.evidence import Evidence, other_arms, sections
from isic_ray.report.html import Picture, clean, picture_uri, style_sheet, template
from isic_ray.report.numbers import (
    NONE,
    decibel,
    duration,
    interval,
    judge_name,
    judges,
    point,
    trusted,
    with_interval,
)
from isic_ray.report.story import Compared

MAX_BYTES = 5_000_000  # a page stays below; pictures get what the rest leaves
_GALLERY_BYTES = 4_000_000
_MAX_ROWS = 200  # rows of one breakdown table

Cell = tuple[str, str]  # a number and its interval
_EMPTY: Cell = (NONE, "")


def build(
    summary: Summary,
    gallery: Sequence[GalleryItem] = (),
    *,
    facts: Mapping[str, object] | None = None,
    evidence: Evidence | None = None,
    pictures: Sequence[tuple[str, Picture]] = (),
    reveal: bool = False,
) -> str:
    """Return the report as one HTML page of at most 5 MB.

    ``gallery``: pictures to show, most telling first. ``facts``: more lines for "How it was
    measured". ``evidence``: the content of evidence.json, whose arms replace the summary's.
    ``pictures``: (caption, picture) that explain the edit, shown as they are. ``reveal`` shows
    flagged pictures unpixelated: write such a page to a place of its own. Raises ValueError for a
    picture that is not uint8 ``[H, W, 3]``.
    """
    shown, left_out = cards(gallery, reveal=reveal, budget=_GALLERY_BYTES)
    arms = other_arms(evidence) if evidence else {}
    arms = arms or {name: arm.figures for name, arm in summary.arms.items()}
    compared = story.compared(summary, arms)
    alarm = summary.alarm or (evidence or {}).get("alarm") or ""
    page = template("page.html.j2").render(
        css=style_sheet("page.css"),
        title=f"Safety report: {clean(summary.model.name)}",
        status=clean(summary.status),
        alarm=clean(alarm),
        headline=story.headline(summary),
        standfirst=story.standfirst(summary),
        tiles=story.tiles(summary, compared),
        curves=_curves(summary) if len(summary.rounds) > 1 else [],
        other_judges=_has_other_judges([*(r.figures for r in summary.rounds), *arms.values()]),
        rounds=_grid([_round_line(each, each is summary.best) for each in summary.rounds]),
        arms=_grid([_Line(c.name, c.figures, c.this_run) for c in compared] if arms else []),
        arm_dots=_arm_dots(compared) if arms else [],
        breakdowns=_breakdowns(summary.first.figures, summary.best.figures),
        gallery=[(role, list(group)) for role, group in groupby(_by_role(shown), _role)],
        left_out=left_out,
        evidence=sections(evidence) if evidence else None,
        pictures=[(clean(caption), picture_uri(picture)) for caption, picture in pictures],
        reveal=reveal,
        facts=story.facts(summary, facts or {}),
        calibration=_calibration(summary),
        limits=story.limits(summary, attacked=bool(evidence and evidence.get("attacks"))),
    )
    return page.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class _Line:
    """A line of a table of figures, for a round or an arm."""

    name: str
    figures: Figures
    strong: bool
    kept: bool = True
    note: str = ""
    seconds: float | None = None
    sampled: int | None = None


@dataclass(frozen=True)
class _GridRow:
    line: _Line
    cells: Sequence[Cell]


@dataclass(frozen=True)
class _Grid:
    """A table of figures, ready for the template."""

    head: Sequence[str]
    rows: Sequence[_GridRow]


@dataclass(frozen=True)
class _Figure:
    """A chart with what stands above it."""

    heading: str
    note: str
    chart: Markup


@dataclass(frozen=True)
class _Change:
    """A line of a breakdown: one concept or group before and after the edit."""

    name: str
    judge: str
    n: int
    before: Cell
    after: Cell
    chart: Markup
    others: str


@dataclass(frozen=True)
class _Breakdown:
    heading: str
    what: str
    rows: Sequence[_Change]


def _role(card: Card) -> str:
    return card.role


def _by_role(found: Sequence[Card]) -> list[Card]:
    order = {"unsafe": 0, "benign": 1}
    return sorted(found, key=lambda card: (order.get(card.role, 2), card.role))


def _css(judge: str) -> str:
    return judge if judge in (AUDIT, SELF) else "other"


def _has_other_judges(figures: Iterable[Figures]) -> bool:
    return any(_css(judge) == "other" for each in figures for judge in each.unsafe)


def _calibration(summary: Summary) -> list[tuple[str, str, int]]:
    """Return (what, number, n) of the self-judge against each auditor."""
    found: list[tuple[str, str, int]] = []
    for key, one in summary.calibration.items():
        measures: dict[str, Rate | Estimate] = {
            "sensitivity": one.sensitivity,
            "specificity": one.specificity,
            "kappa": one.kappa,
        }
        for name, value in measures.items():
            found.append((clean(f"{judge_name(key)} {name}"), with_interval(value), value.n))
    return found


def _curves(summary: Summary) -> list[_Figure]:
    ticks = [str(each.round) for each in summary.rounds]
    best = summary.rounds.index(summary.best)
    unsafe = [each.figures.unsafe for each in summary.rounds]
    exact = [each.figures.benign.exact for each in summary.rounds]
    found = []
    for heading, note, rates in (
        ("Unsafe pictures", "share of held-out unsafe prompts, lower is better", unsafe),
        (
            "Benign pictures exact",
            "share that shows exactly what was asked, higher is better",
            exact,
        ),
    ):
        series = [_series(judge, summary.rounds, rates) for judge in judges(*rates)]
        if not series:
            continue
        low = charts.axis_floor([each.rate for one in series for each in one.points])
        chart = charts.curves(f"{heading} by round", series, ticks, low=low, best=best)
        found.append(_Figure(heading, note + _axis_note(low), chart))
    return found


def _axis_note(low: float) -> str:
    return f"; the axis starts at {100 * low:.0f}%" if low else ""


def _series(judge: str, rounds: Sequence[Round], rates: Sequence[Rates]) -> charts.Series:
    points = [
        charts.Point(
            index,
            each[judge],
            entry.kept,
            f"round {entry.round}{'' if entry.kept else ', not kept'}",
        )
        for index, (entry, each) in enumerate(zip(rounds, rates, strict=True))
        if judge in each
    ]
    return charts.Series(clean(judge_name(judge)), _css(judge), tuple(points))


def _round_line(entry: Round, best: bool) -> _Line:
    name = "0, no edit" if entry.round == 0 else str(entry.round)
    return _Line(
        name, entry.figures, best, entry.kept, clean(entry.note), entry.seconds, entry.sampled
    )


def _grid(lines: Sequence[_Line]) -> _Grid:
    """Return a table with a column for every number that any of the lines has."""
    columns: list[tuple[str, list[Cell]]] = []
    unsafe = [line.figures.unsafe for line in lines]
    exact = [line.figures.benign.exact for line in lines]
    for what, rates in (("unsafe", unsafe), ("benign exact", exact)):
        for judge in judges(*rates):
            cells = [_cell(each.get(judge)) for each in rates]
            columns.append((f"{what}, {clean(judge_name(judge))}", cells))
    benign = [line.figures.benign for line in lines]
    columns += [
        ("benign, flagged", [_cell(trusted(each.flagged)) for each in benign]),
        ("benign, PSNR", [(decibel(each.psnr), "") for each in benign]),
        ("time", [(duration(line.seconds), "") for line in lines]),
        ("new samples", [_count(line.sampled) for line in lines]),
    ]
    columns = [(name, cells) for name, cells in columns if set(cells) - {_EMPTY}]
    rows = [
        _GridRow(line, [cells[index] for _, cells in columns]) for index, line in enumerate(lines)
    ]
    return _Grid([name for name, _ in columns], rows if columns else [])


def _cell(rate: Rate | None) -> Cell:
    return point(rate), interval(rate)


def _count(number: int | None) -> Cell:
    return (NONE if number is None else str(number)), ""


def _arm_dots(compared: Sequence[Compared]) -> list[_Figure]:
    if len(compared) < 2:
        return []
    unsafe = [each.figures.unsafe for each in compared]
    exact = [each.figures.benign.exact for each in compared]
    found = []
    for heading, note, by_arm in (
        ("Unsafe pictures", "lower is better", unsafe),
        ("Benign pictures exact", "higher is better", exact),
    ):
        rows = [
            charts.Row(
                each.name,
                tuple((_css(judge), rates[judge]) for judge in judges(rates)),
                each.this_run,
            )
            for each, rates in zip(compared, by_arm, strict=True)
        ]
        every = [rate for row in rows for _, rate in row.rates]
        if every:
            low = charts.axis_floor(every)
            chart = charts.dots(f"{heading} by arm", rows, low=low)
            found.append(_Figure(heading, note + _axis_note(low), chart))
    return found


def _breakdowns(first: Figures, best: Figures) -> list[_Breakdown]:
    """Return tables of the unsafe rates by concept and by group."""
    found = []
    for what, before, after in (
        ("concept", first.per_concept, best.per_concept),
        ("group", first.per_group, best.per_group),
    ):
        names = list(dict.fromkeys([*before, *after]))[:_MAX_ROWS]
        pairs = [(name, before.get(name, {}), after.get(name, {})) for name in names]
        rows = [_change(clean(name), old, new) for name, old, new in pairs if old or new]
        if rows:
            found.append(_Breakdown(f"Unsafe by {what}", what, rows))
    return found


def _change(name: str, old: Rates, new: Rates) -> _Change:
    judge, *others = judges(old, new)
    before, after = old.get(judge), new.get(judge)
    known = after or before
    texts = [f"{clean(judge_name(other))} {with_interval(new.get(other))}" for other in others]
    return _Change(
        name=name,
        judge=clean(judge_name(judge)),
        n=known.n if known else 0,
        before=_cell(before),
        after=_cell(after),
        chart=charts.dumbbell(before, after),
        others="; ".join(texts) or NONE,
    )
