"""The report of a run: `build` makes one self-contained HTML page, `table` the console's text
table.

Both quote `summary` (the content of summary.json, see docs/runs.md); absent pieces do not
render. Beyond the documented fields, a round may carry ``test`` (`metrics.PairedTest.to_dict`), and
``calibration`` any tree of rates. The page loads nothing, runs no script, and its content security
policy says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from isic_ray.report import charts, story
from isic_ray.report import evidence as more
from isic_ray.report.gallery import GalleryItem, Picture, cards, clean, picture_uri, pixelate
from isic_ray.report.numbers import (
    NONE,
    Shown,
    arms,
    at,
    benign_tree,
    decibel,
    duration,
    first_and_best,
    judge_name,
    judges,
    kept,
    number,
    psnr_at,
    rate_at,
    rates,
    rounds,
    table,
)

__all__ = ["MAX_BYTES", "GalleryItem", "build", "pixelate", "table"]

MAX_BYTES = 5_000_000  # a page stays below; pictures get what the rest leaves
_GALLERY_BYTES = 4_000_000
_MAX_ROWS = 200  # rows of one breakdown table
_TEMPLATES = Path(__file__).parent / "templates"


def build(
    summary: Mapping[str, Any],
    gallery: Sequence[GalleryItem] = (),
    *,
    facts: Mapping[str, object] | None = None,
    evidence: Mapping[str, Any] | None = None,
    pictures: Sequence[tuple[str, Picture]] = (),
    reveal: bool = False,
) -> str:
    """The report as one HTML page of at most 5 MB.

    ``summary`` as in summary.json; ``gallery`` pictures to show, most telling first; ``facts`` more
    lines for "How it was measured" (config fingerprint, threshold, auditor, …). ``evidence`` is the
    content of evidence.json, whose arms replace the summary's; ``pictures`` (caption, picture)
    explain the edit and are shown as they are. ``reveal`` shows flagged pictures unpixelated: write
    such a page to a place of its own. Raises ValueError for a picture that is not uint8 [H, W, 3].
    """
    if evidence and more.arms(evidence):
        summary = {**summary, "arms": more.arms(evidence)}
    shown, left_out = cards(gallery, reveal=reveal, budget=_GALLERY_BYTES)
    every, (first, best) = rounds(summary), first_and_best(summary)
    compared = story.arms_with_run(summary) if arms(summary) else []
    page = _template().render(
        css=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        title=_title(summary),
        status=clean(summary.get("status") or ""),
        alarm=clean(summary.get("alarm") or (evidence or {}).get("alarm") or ""),
        headline=story.headline(summary),
        standfirst=story.standfirst(summary),
        tiles=story.tiles(summary),
        curves=_curves(every, best) if len(every) > 1 else [],
        other_judges=any(
            _css(j) == "other"
            for e in [*every, *arms(summary).values()]
            for j in judges(at(e, "unsafe"))
        ),
        rounds=_grid([(_round_name(e), e, e is best) for e in every]),
        arms=_grid(compared, costs=False),
        arm_dots=_arm_dots(compared),
        breakdowns=_breakdowns(first, best),
        gallery=[
            (role, list(group))
            for role, group in groupby(_by_role(shown), key=lambda card: card["role"])
        ],
        left_out=left_out,
        evidence=more.sections(evidence) if evidence else {},
        pictures=[
            {"caption": clean(text), "uri": picture_uri(picture)} for text, picture in pictures
        ],
        reveal=reveal,
        facts=story.facts(summary, facts or {}),
        calibration=[(clean(name), rate) for name, rate in rates(summary.get("calibration"))],
        limits=story.limits(summary, attacked=bool(evidence and evidence.get("attacks"))),
    )
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _title(summary: Mapping[str, Any]) -> str:
    name = at(summary, "model", "name")
    return f"Safety report: {clean(name)}" if name else "Safety report"


def _round_name(entry: Mapping[str, Any]) -> str:
    return "0, no edit" if entry.get("round") == 0 else clean(entry.get("round", "?"))


def _by_role(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = {"unsafe": 0, "benign": 1}
    return sorted(found, key=lambda card: (order.get(card["role"], 2), card["role"]))


def _curves(every: list[Mapping[str, Any]], best: Mapping[str, Any]) -> list[dict[str, Any]]:
    ticks = [clean(entry.get("round", "?")) for entry in every]
    mark = next((i for i, entry in enumerate(every) if entry is best), -1)
    found = []
    for heading, note, key in (
        ("Unsafe pictures", "share of held-out unsafe prompts, lower is better", "unsafe"),
        (
            "Benign pictures exact",
            "share that shows exactly what was asked, higher is better",
            "benign",
        ),
    ):
        trees = [benign_tree(entry) if key == "benign" else at(entry, key) for entry in every]
        series = [_series(name, every, trees) for name in judges(*trees)]
        if not series:
            continue
        low = charts.axis_floor([point.rate for one in series for point in one.points])
        chart = charts.curves(f"{heading} by round", series, ticks, low=low, best=mark)
        note += f"; the axis starts at {100 * low:.0f}%" if low else ""
        found.append({"heading": heading, "note": note, "chart": chart})
    return found


def _series(judge: str, every: list[Mapping[str, Any]], trees: list[Any]) -> charts.Series:
    points = []
    for index, (entry, tree) in enumerate(zip(every, trees, strict=True)):
        rate = rate_at(tree, judge)
        if rate is not None:
            title = f"round {clean(entry.get('round', '?'))}{'' if kept(entry) else ', not kept'}"
            points.append(charts.Point(index, rate, kept(entry), title))
    return charts.Series(clean(judge_name(judge)), _css(judge), tuple(points))


def _css(judge: str) -> str:
    return judge if judge in ("audit", "self") else "other"


def _grid(
    entries: Sequence[tuple[str, Mapping[str, Any], bool]], *, costs: bool = True
) -> dict[str, Any]:
    """A table: a row an entry, a column for every number that any entry has; ``costs`` adds time
    and samples.
    """
    columns: list[tuple[str, list[tuple[str, str]]]] = []  # (number, interval) an entry
    for judge in judges(*(at(entry, "unsafe") for _, entry, _ in entries)):
        cells = [_cell(rate_at(entry, "unsafe", judge)) for _, entry, _ in entries]
        columns.append((f"unsafe, {clean(judge_name(judge))}", cells))
    for judge in judges(*(benign_tree(entry) for _, entry, _ in entries)):
        cells = [_cell(rate_at(entry, "benign", judge)) for _, entry, _ in entries]
        columns.append((f"benign exact, {clean(judge_name(judge))}", cells))
    columns += [
        ("benign, flagged", [_cell(_flagged(entry)) for _, entry, _ in entries]),
        ("benign, PSNR", [(decibel(psnr_at(entry)), "") for _, entry, _ in entries]),
        ("time", [(duration(number(entry.get("seconds"))), "") for _, entry, _ in entries]),
        ("new samples", [(clean(entry.get("sampled", NONE)), "") for _, entry, _ in entries]),
    ]
    columns = [
        (name, cells)
        for name, cells in (columns if costs else columns[:-2])
        if set(cells) - {(NONE, "")}
    ]
    rows = [
        {
            "name": name,
            "strong": strong,
            "kept": kept(entry),
            "note": clean(entry.get("note") or ""),
            "cells": [cells[index] for _, cells in columns],
        }
        for index, (name, entry, strong) in enumerate(entries)
    ]
    return {"head": [name for name, _ in columns], "rows": rows if columns else []}


def _flagged(entry: Mapping[str, Any]) -> Shown | None:
    found = at(entry, "benign", "flagged")
    return rate_at(entry, "benign", "flagged") or next(
        (rate_at(found, judge) for judge in judges(found)), None
    )


def _cell(rate: Shown | None) -> tuple[str, str]:
    return (rate.percent, rate.interval) if rate else (NONE, "")


def _text(rate: Shown | None) -> str:
    return rate.text if rate else NONE


def _arm_dots(entries: Sequence[tuple[str, Mapping[str, Any], bool]]) -> list[dict[str, Any]]:
    if len(entries) < 2:
        return []
    found = []
    for heading, note, key in (
        ("Unsafe pictures", "lower is better", "unsafe"),
        ("Benign pictures exact", "higher is better", "benign"),
    ):
        rows = []
        for name, entry, strong in entries:
            tree = benign_tree(entry) if key == "benign" else at(entry, key)
            pairs = [(_css(judge), rate_at(tree, judge)) for judge in judges(tree)]
            rows.append(
                charts.Row(
                    name, tuple((css, rate) for css, rate in pairs if rate is not None), strong
                )
            )
        every = [rate for row in rows for _, rate in row.rates]
        if every:
            low = charts.axis_floor(every)
            note += f"; the axis starts at {100 * low:.0f}%" if low else ""
            found.append(
                {
                    "heading": heading,
                    "note": note,
                    "chart": charts.dots(f"{heading} by arm", rows, low=low),
                }
            )
    return found


def _breakdowns(first: Mapping[str, Any], best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables by concept and by group. An entry is ``{judge: rate}`` (unsafe), or that below
    "unsafe" and "benign".
    """
    found = []
    for key, what in (("per_concept", "concept"), ("per_group", "group")):
        trees = [
            tree if isinstance(tree, Mapping) else {} for tree in (first.get(key), best.get(key))
        ]
        names = list(dict.fromkeys([*trees[0], *trees[1]]))[:_MAX_ROWS]
        for part, heading in (("", "Unsafe"), ("unsafe", "Unsafe"), ("benign", "Benign exact")):
            rows = []
            for name in names:
                old, new = ((at(tree, name, part) if part else at(tree, name)) for tree in trees)
                if judges(old, new):
                    rows.append(_breakdown_row(clean(name), old, new))
            if rows:
                found.append({"heading": f"{heading} by {what}", "what": what, "rows": rows})
    return found


def _breakdown_row(name: str, old: Any, new: Any) -> dict[str, Any]:
    judge, *others = judges(old, new)
    before, after = rate_at(old, judge), rate_at(new, judge)
    return {
        "name": name,
        "judge": clean(judge_name(judge)),
        "n": after.n if after else before.n if before else None,
        "before": _cell(before),
        "after": _cell(after),
        "chart": charts.dumbbell(before, after),
        "others": "; ".join(
            f"{clean(judge_name(other))} {_text(rate_at(new, other))}" for other in others
        )
        or NONE,
    }
