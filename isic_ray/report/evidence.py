"""What `isic evaluate` measured (evidence.json): sections of the report, and the console's table.

evidence.json stays JSON here. Numbers are quoted, never computed again; a part that is absent does
not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from isic_ray.metrics.statistics import Estimate, Rate
from isic_ray.metrics.summary import AUDIT, SELF, Figures
from isic_ray.report.charts import Mark, pareto
from isic_ray.report.html import clean
from isic_ray.report.numbers import (
    NONE,
    judge_name,
    p_value,
    percent,
    trusted,
    with_interval,
)
from isic_ray.report.text import aligned

Evidence = Mapping[str, Any]
Row = list[str]

_NO_EDIT, _THIS_RUN = "no edit", "this run"
_FIRST = ("rewriting the prompt", "negative prompt", "paper + Δ", "paper", "random + Δ")


@dataclass(frozen=True)
class Grid:
    """A table with a title and a note."""

    title: str
    head: Sequence[str]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Pareto:
    """The chart of all arms, and the list of what its numbers stand for."""

    chart: Markup
    key: Sequence[tuple[str, str, str, bool]]
    """(arm, unsafe, exact, is this run), in the order of the chart's numbers."""


@dataclass(frozen=True)
class Sections:
    """What the page's evidence part shows."""

    pareto: Pareto | None
    grids: Sequence[Grid]


def other_arms(evidence: Evidence) -> dict[str, Figures]:
    """Return the arms beside "no edit" and "this run", those that people ask for first in front."""
    found = _arms(evidence)
    order = [*(name for name in _FIRST if name in found), *found]
    return {name: found[name] for name in order if name not in (_NO_EDIT, _THIS_RUN)}


def sections(evidence: Evidence) -> Sections:
    """Return what the page's evidence part shows."""
    grids = [
        _differences(evidence),
        _challenges(evidence),
        _concepts(evidence),
        _attacks(evidence),
        _recovery(evidence),
        _quality(evidence),
        _kinds(evidence),
        _judges(evidence),
        _explanation(_tree(evidence, "explanation")),
    ]
    return Sections(_pareto(evidence), [grid for grid in grids if grid.rows])


def evidence_table(evidence: Evidence) -> str:
    """Return all figures as plain text, for a console."""
    grids = [_arm_grid(evidence), *sections(evidence).grids]
    parts = [f"{grid.title}\n{_plain(grid)}" for grid in grids if grid.rows]
    parts.append("Shares with 95% intervals; by the auditor unless it says otherwise.\n")
    if alarm := evidence.get("alarm"):
        parts.append(f"ALARM: {clean(alarm)}\n")
    return "\n".join(parts)


def explanation_table(facts: Mapping[str, Any]) -> str:
    """Return what an edit changed (`Explanation.facts`) as plain text."""
    grid = _explanation(facts)
    return _plain(grid) if grid.rows else "nothing was changed\n"


def _plain(grid: Grid) -> str:
    head, *rows = aligned([grid.head, *grid.rows])
    rule = "-" * max(map(len, [head, *rows]))
    return "\n".join([head, rule, *rows]) + "\n"


# Reading


def _at(tree: Any, *path: str) -> Any:
    """Return the piece at a path; None when any part of the way is absent."""
    for key in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def _tree(source: Any, *path: str) -> dict[str, Any]:
    """Return the mapping at a path without its entries that are None; {} for anything else."""
    found = _at(source, *path)
    if not isinstance(found, Mapping):
        return {}
    return {str(key): value for key, value in found.items() if value is not None}


def _number(source: Any, *path: str) -> Rate | Estimate | None:
    """Return the rate or estimate at a path; None for anything else."""
    found = _tree(source, *path)
    if not {"n", "ci"} <= found.keys():
        return None
    if "value" in found:
        return Estimate.from_dict(found)
    return Rate.from_dict({"rate": None, **found})


def _rates(source: Any, *path: str) -> dict[str, Rate]:
    """Return the rates by judge (or kind) at a path; what is no rate is left out."""
    found = {key: _number(each) for key, each in _tree(source, *path).items()}
    return {key: each for key, each in found.items() if isinstance(each, Rate)}


def _arms(evidence: Evidence) -> dict[str, Figures]:
    return {name: Figures.from_record(arm) for name, arm in _tree(evidence, "arms").items()}


# Sections


def _arm_grid(evidence: Evidence) -> Grid:
    rows = []
    for name, arm in _arms(evidence).items():
        rates = [arm.unsafe.get(AUDIT), arm.unsafe.get(SELF), trusted(arm.benign.exact)]
        rows.append([clean(name), *map(with_interval, rates)])
    head = ["", "unsafe, auditor", "unsafe, self", "benign exact"]
    return Grid("arms, on the run's held-out prompts", head, rows)


def _pareto(evidence: Evidence) -> Pareto | None:
    marks: list[Mark] = []
    key: list[tuple[str, str, str, bool]] = []
    for name, arm in _arms(evidence).items():
        unsafe, exact = trusted(arm.unsafe), trusted(arm.benign.exact)
        if not unsafe or not exact or unsafe.rate is None or exact.rate is None:
            continue
        number, label, strong = str(len(marks) + 1), clean(name), name == _THIS_RUN
        texts = with_interval(unsafe), with_interval(exact)
        title = f"{number} {label}: unsafe {texts[0]}, exact {texts[1]}"
        marks.append(
            Mark(number, title, unsafe.rate, exact.rate, unsafe.ci, exact.ci, strong=strong)
        )
        key.append((label, *texts, strong))
    if len(marks) < 2:
        return None
    return Pareto(pareto("Safety against preservation, by arm", marks), key)


def _differences(evidence: Evidence) -> Grid:
    """Return what each arm changes against no edit, on the same prompts."""
    rows = []
    for name, arm in _tree(evidence, "arms").items():
        less, cost = (
            _at(arm, "against", part, AUDIT) or _at(arm, "against", part, SELF)
            for part in ("unsafe", "benign")
        )
        if name != _NO_EDIT and less:
            rows.append([clean(name), _points(less), _counts(less), _points(cost), _counts(cost)])
    head = ["arm", "unsafe", "made safe, unsafe", "benign exact", "broken, fixed"]
    note = "Points of percent; paired 95% intervals."
    return Grid("Against no edit, on the same prompts", head, rows, note)


def _points(change: Any) -> str:
    found = _number(change, "difference")
    if not isinstance(found, Estimate) or found.value is None:
        return NONE
    value, low, high = (f"{100 * each:+.1f}" for each in (found.value, *found.ci))
    return f"{value} [{low}, {high}]"


def _counts(change: Any) -> str:
    return f"{_at(change, 'test', 'fixed')}, {_at(change, 'test', 'broken')}" if change else NONE


def _challenges(evidence: Evidence) -> Grid:
    rows = []
    for name, one in _tree(evidence, "challenges").items():
        part = "benign" if one.get("role") == "benign" else "unsafe"
        before, after = (trusted(_rates(one, when, part)) for when in ("before", "after"))
        count = str(after.n) if after else NONE
        p = _at(one, "against", part, AUDIT, "test", "p")
        rows.append(
            [
                clean(name),
                "exact" if part == "benign" else "unsafe",
                count,
                with_interval(before),
                with_interval(after),
                NONE if p is None else p_value(p),
            ]
        )
    head = ["set", "share", "n", "before", "after", "paired test"]
    note = (
        "Prompts that took no part in building or choosing the edit. "
        "p: paired exact test that the share fell."
    )
    return Grid("On new prompts", head, rows, note)


def _concepts(evidence: Evidence) -> Grid:
    names = (_NO_EDIT, "never saw it", "saw it")
    rows = []
    for concept, by_arm in _tree(evidence, "held_out_concepts").items():
        rates = [trusted(_rates(by_arm, name)) for name in names]
        rows.append([clean(concept), *map(with_interval, rates)])
    note = (
        "Edits alone, on fresh scenes of the concept: one built without any pair that shows it, "
        "one with all pairs."
    )
    return Grid("Concepts that built no edit", ["unsafe pictures of", *names], rows, note)


def _attacks(evidence: Evidence) -> Grid:
    rows = []
    names = {"words": "other words", "seeds": "other seeds"}
    for vary, one in _tree(evidence, "attacks").items():
        for judge in (AUDIT, SELF):
            before, after = _number(one, judge, "before"), _number(one, judge, "after")
            if after:
                texts = with_interval(before), with_interval(after)
                name = clean(judge_name(judge))
                rows.append([names.get(vary, vary), name, str(after.n), *texts])
    budget = _tree(evidence, "plan", "budget")
    drawn = 1 + budget.get("rounds", 0) * budget.get("proposals", 0)
    note = (
        "A greedy search that looks at the pictures (through the auditor), "
        f"at most {drawn} a prompt, on the edit."
    )
    head = ["varied", "judge", "n", "first picture", "worst found"]
    return Grid("Searching for unsafe pictures", head, rows, note)


def _recovery(evidence: Evidence) -> Grid:
    every = _tree(evidence, "recovery")
    rows = [[clean(name), with_interval(trusted(_rates(tree)))] for name, tree in every.items()]
    count = _at(evidence, "plan", "recovery_pictures")
    note = (
        "Anyone who holds the original table restores it exactly. Without it: fine-tuning the "
        f"edited table on {count} unsafe pictures of one's own."
    )
    return Grid("Undoing the edit", ["table", "unsafe pictures"], rows, note)


def _quality(evidence: Evidence) -> Grid:
    names = {
        "psnr_per_picture": "PSNR, dB, mean of pictures",
        "ssim": "SSIM (1 = equal)",
        "gmsd": "GMSD (0 = equal)",
    }
    rows = []
    for key, name in names.items():
        found = _number(evidence, "quality", key)
        if isinstance(found, Estimate) and found.value is not None:
            low, high = found.ci
            rows.append([name, f"{found.value:.3f}", f"[{low:.3f}, {high:.3f}]", str(found.n)])
    head = ["benign pictures against the unedited ones", "mean", "95% interval", "n"]
    return Grid("Fidelity", head, rows)


def _kinds(evidence: Evidence) -> Grid:
    """Return by benign kind how often it can still be seen; of the near-neighbours if measured."""
    source = _tree(evidence, "challenges", "near-neighbours", "kinds")
    source = source or _tree(evidence, "quality", "kinds")
    before, after = _rates(source, "before", AUDIT), _rates(source, "after", AUDIT)
    rows = [
        [clean(kind), str(rate.n), with_interval(before.get(kind)), with_interval(rate)]
        for kind, rate in after.items()
    ]
    return Grid("Benign kinds that can still be seen", ["kind", "n", "before", "after"], rows)


def _judges(evidence: Evidence) -> Grid:
    measures = ("sensitivity", "specificity", "kappa")
    rows = []
    for when in ("before", "after"):
        for judge, one in _tree(evidence, "judges", when, "calibration").items():
            name = f"self-judge against {clean(judge_name(judge))}, {when} the edit"
            rows.append([name, *(with_interval(_number(one, measure)) for measure in measures)])
    raw, corrected, audit = (
        _number(evidence, "judges", "after", name) for name in ("self_raw", "self_corrected", AUDIT)
    )
    note = ""
    if corrected:
        note = (
            f"After the edit the self-judge says {with_interval(raw)} unsafe; corrected for its "
            f"errors on the new prompts (Rogan-Gladen) {with_interval(corrected)}; the auditor "
            f"counts {with_interval(audit)}."
        )
    return Grid("How far the self-judge can be trusted", ["", *measures], rows, note)


def _explanation(facts: Mapping[str, Any]) -> Grid:
    """Return the edit's facts as a table of name and value."""
    moved, rows = _tree(facts, "distortion"), []
    if moved:
        rows.append(["rows changed", f"{moved.get('changed')} of {facts.get('rows')}"])
        quartiles = moved.get("cosine_quartiles") or []
        if len(quartiles) == 5:
            texts = ", ".join(f"{quartiles[i]:.2f}" for i in (0, 2, 4))
            rows.append(["cosine to the old row: least, median, most", texts])
        rows.append(["rows that now draw like another", str(moved.get("colliding"))])
        rows.append(["rows without direction", str(moved.get("dead"))])
        for name, share in _tree(facts, "usage").items():
            rows.append([f"tokens of {clean(name)} pictures that are changed", percent(share)])
        if spectrum := facts.get("spectrum"):
            texts = ", ".join(f"{100 * energy:.0f}%" for energy in spectrum[:6])
            rows.append(["energy of the harmful directions", texts])
        for pair, angles in _tree(facts, "principal_angles").items():
            texts = ", ".join(f"{angle:.0f}°" for angle in angles)
            rows.append([f"angles between {clean(pair)}", texts])
    return Grid("What the edit changed", ["", ""], rows)
