"""The evidence of `isic evaluate` (evidence.json) for people: sections of the report, and the
console's table.

Numbers are quoted, never computed anew; a part that is absent does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isic_ray.report.charts import Arm, pareto
from isic_ray.report.gallery import clean
from isic_ray.report.numbers import (
    NONE,
    Shown,
    at,
    benign,
    judge_name,
    number,
    p_value,
    percent,
    rate_at,
    unsafe,
)

Evidence = Mapping[str, Any]
Row = list[str]
Grid = dict[str, Any]
_PARTS = ("unsafe", "benign")
_FIRST = ("rewriting the prompt", "negative prompt", "paper + Δ", "paper", "random + Δ")


def arms(evidence: Evidence) -> dict[str, Mapping[str, Any]]:
    """The arms beside "no edit" and "this run", those that people ask for first in front."""
    found = {
        str(k): v for k, v in _tree(evidence, "arms").items() if k not in ("no edit", "this run")
    }
    order = [name for name in _FIRST if name in found] + [
        name for name in found if name not in _FIRST
    ]
    return {name: found[name] for name in order}


def sections(evidence: Evidence) -> dict[str, Any]:
    """What the page's evidence part shows."""
    return {
        "pareto": _pareto(evidence),
        "differences": _differences(evidence),
        "challenges": _challenges(evidence),
        "concepts": _concepts(evidence),
        "attacks": _attacks(evidence),
        "recovery": _recovery(evidence),
        "quality": _quality(evidence),
        "kinds": _kinds(evidence),
        "judges": _judges(evidence),
        "explanation": explanation(_tree(evidence, "explanation")),
    }


def evidence_table(evidence: Evidence) -> str:
    """All figures as plain text, for a console."""
    parts = [("arms, on the run's held-out prompts", _arm_rows(evidence))]
    parts += [
        (grid["title"], grid)
        for key, grid in sections(evidence).items()
        if key != "pareto" and grid
    ]
    text = [f"{title}\n{_plain(grid['head'], grid['rows'])}" for title, grid in parts if grid]
    alarm = at(evidence, "alarm")
    tail = [f"ALARM: {clean(alarm)}\n"] if alarm else []
    return "\n".join(
        [*text, "Shares with 95% intervals; by the auditor unless it says otherwise.\n", *tail]
    )


def explanation_table(facts: Mapping[str, Any]) -> str:
    """What an edit changed, as plain text."""
    grid = explanation(facts)
    return _plain(grid["head"], grid["rows"]) if grid else "nothing was changed\n"


def human_table(found: Mapping[str, Any]) -> str:
    """What human labels say (`human_audit.import_labels`), as plain text."""
    rows = []
    for when, part in found.items():
        human = rate_at(part, "human")
        rows.append(
            [f"{when} the edit, people", _text(human), NONE, NONE, f"n = {human.n if human else 0}"]
        )
        for judge, one in part["judges"].items():
            errors = ", ".join(_text(rate_at(one, name)) for name in ("sensitivity", "specificity"))
            name = f"{when} the edit, {clean(judge_name(judge))}"
            rows.append(
                [name, _text(rate_at(one, "raw")), _text(rate_at(one, "corrected")), errors, ""]
            )
    return _plain(["unsafe pictures", "rate", "corrected", "sensitivity, specificity", ""], rows)


def _tree(source: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at a path without its entries that are None; empty for anything else."""
    found = at(source, *path) if path else source
    return (
        {str(k): v for k, v in found.items() if v is not None} if isinstance(found, Mapping) else {}
    )


def _plain(head: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [list(head), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    written = [
        "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    rule = "-" * max(map(len, written))
    return "\n".join([written[0], rule, *written[1:]]) + "\n"


def _grid(title: str, head: Sequence[str], rows: Sequence[Row], note: str = "") -> Grid:
    return {"title": title, "head": list(head), "rows": list(rows), "note": note} if rows else {}


def _text(shown: Shown | None) -> str:
    return shown.text if shown else NONE


def _arm_rows(evidence: Evidence) -> Grid:
    every = _tree(evidence, "arms")
    judges = ("audit", "self")
    rows = [
        [
            clean(name),
            *(_text(rate_at(arm, "unsafe", judge)) for judge in judges),
            _text(benign(arm)),
        ]
        for name, arm in every.items()
    ]
    return _grid("arms", ["", "unsafe, auditor", "unsafe, self", "benign exact"], rows)


def _pareto(evidence: Evidence) -> dict[str, Any]:
    found = []
    for name, arm in _tree(evidence, "arms").items():
        rate, exact = unsafe(arm), benign(arm)
        if (
            rate is not None
            and exact is not None
            and rate.value is not None
            and exact.value is not None
        ):
            found.append(Arm(clean(name), rate, exact, name == "this run"))
    if len(found) < 2:
        return {}
    key = [
        (str(i), arm.label, arm.unsafe.text, arm.exact.text, arm.strong)
        for i, arm in enumerate(found, 1)
    ]
    return {"chart": pareto("Safety against preservation, by arm", found), "key": key}


def _differences(evidence: Evidence) -> Grid:
    """What each arm changes against no edit, on the same prompts."""
    rows = []
    for name, arm in _tree(evidence, "arms").items():
        less, cost = (
            at(arm, "against", part, "audit") or at(arm, "against", part, "self") for part in _PARTS
        )
        if name != "no edit" and less:
            rows.append([clean(name), _points(less), _counts(less), _points(cost), _counts(cost)])
    head = ["arm", "unsafe", "made safe, unsafe", "benign exact", "broken, mended"]
    return _grid(
        "Against no edit, on the same prompts",
        head,
        rows,
        "Points of percent; paired 95% intervals.",
    )


def _points(found: Any) -> str:
    shown = rate_at(found, "difference")
    if shown is None or shown.value is None or shown.low is None or shown.high is None:
        return NONE
    return f"{100 * shown.value:+.1f} [{100 * shown.low:+.1f}, {100 * shown.high:+.1f}]"


def _counts(found: Any) -> str:
    return NONE if not found else f"{at(found, 'test', 'fixed')}, {at(found, 'test', 'broken')}"


def _challenges(evidence: Evidence) -> Grid:
    rows = []
    for name, one in _tree(evidence, "challenges").items():
        read, what = (benign, "exact") if one.get("role") == "benign" else (unsafe, "unsafe")
        before, after = read(_tree(one, "before")), read(_tree(one, "after"))
        count = str(after.n) if after else NONE
        test = at(one, "against", "benign" if what == "exact" else "unsafe", "audit", "test", "p")
        rows.append(
            [clean(name), what, count, _text(before), _text(after), p_value(number(test)) or NONE]
        )
    note = "Prompts that took no part in building or choosing the edit. p: paired exact test that the share fell."
    return _grid(
        "On new prompts", ["set", "share", "n", "before", "after", "paired test"], rows, note
    )


def _concepts(evidence: Evidence) -> Grid:
    names = ("no edit", "never saw it", "saw it")
    rows = []
    for concept, by_arm in _tree(evidence, "held_out_concepts").items():
        rows.append(
            [clean(concept), *(_text(unsafe({"unsafe": by_arm.get(name)})) for name in names)]
        )
    note = "Edits alone, on fresh scenes of the concept: one built without any pair that shows it, one with all pairs."
    return _grid("Concepts that built no edit", ["unsafe pictures of", *names], rows, note)


def _attacks(evidence: Evidence) -> Grid:
    rows = []
    names = {"words": "other words", "seeds": "other seeds"}
    for vary, one in _tree(evidence, "attacks").items():
        for judge in ("audit", "self"):
            before, after = rate_at(one, judge, "before"), rate_at(one, judge, "after")
            if after:
                rows.append(
                    [
                        names.get(vary, vary),
                        clean(judge_name(judge)),
                        str(after.n),
                        _text(before),
                        _text(after),
                    ]
                )
    budget = _tree(evidence, "plan", "budget")
    drawn = 1 + int(number(budget.get("rounds")) or 0) * int(number(budget.get("proposals")) or 0)
    note = f"A greedy search that looks at the pictures (through the auditor), at most {drawn} a prompt, on the edit."
    return _grid(
        "Searching for unsafe pictures",
        ["varied", "judge", "n", "first picture", "worst found"],
        rows,
        note,
    )


def _recovery(evidence: Evidence) -> Grid:
    every = _tree(evidence, "recovery")
    rows = [[clean(name), _text(unsafe({"unsafe": tree}))] for name, tree in every.items()]
    count = at(evidence, "plan", "recovery_pictures")
    note = (
        f"Whoever holds the original table restores it exactly. Without it: fine-tuning the edited table on {count} "
        "unsafe pictures of one's own."
    )
    return _grid("Undoing the edit", ["table", "unsafe pictures"], rows, note)


def _quality(evidence: Evidence) -> Grid:
    names = {
        "psnr_per_picture": "PSNR, dB, mean of pictures",
        "ssim": "SSIM (1 = equal)",
        "gmsd": "GMSD (0 = equal)",
    }
    rows = []
    for key, name in names.items():
        value, ends = at(evidence, "quality", key, "value"), at(evidence, "quality", key, "ci")
        if number(value) is not None and isinstance(ends, list):
            rows.append(
                [
                    name,
                    f"{value:.3f}",
                    f"[{ends[0]:.3f}, {ends[1]:.3f}]",
                    str(at(evidence, "quality", key, "n")),
                ]
            )
    head = ["benign pictures against the unedited ones", "mean", "95% interval", "n"]
    return _grid("Fidelity", head, rows)


def _kinds(evidence: Evidence) -> Grid:
    """By benign kind: how often it can still be seen; the near-neighbours' own set first."""
    rows = []
    source = at(evidence, "challenges", "near-neighbours", "kinds") or _tree(
        evidence, "quality", "kinds"
    )
    before, after = _tree(source, "before", "audit"), _tree(source, "after", "audit")
    for kind in after:
        old, new = rate_at(before, kind), rate_at(after, kind)
        rows.append([clean(kind), str(new.n) if new else NONE, _text(old), _text(new)])
    return _grid("Benign kinds that can still be seen", ["kind", "n", "before", "after"], rows)


def _judges(evidence: Evidence) -> Grid:
    rows = []
    for when in ("before", "after"):
        found = _tree(evidence, "judges", when)
        for judge, one in _tree(found, "calibration").items():
            measures = (rate_at(one, name) for name in ("sensitivity", "specificity", "kappa"))
            rows.append(
                [
                    f"self-judge against {clean(judge_name(judge))}, {when} the edit",
                    *map(_text, measures),
                ]
            )
    head = ["", "sensitivity", "specificity", "kappa"]
    after = _tree(evidence, "judges", "after")
    note = ""
    if corrected := rate_at(after, "self_corrected"):
        raw, audit = rate_at(after, "self_raw"), rate_at(after, "audit")
        note = (
            f"After the edit the self-judge says {_text(raw)} unsafe; corrected for its errors on the new prompts "
            f"(Rogan-Gladen) {corrected.text}; the auditor counts {_text(audit)}."
        )
    return _grid("How far the self-judge can be trusted", head, rows, note)


def explanation(facts: Mapping[str, Any]) -> Grid:
    """The edit's facts as a table of name and value."""
    moved = _tree(facts, "distortion")
    if not moved:
        return {}
    rows = [["rows changed", f"{moved.get('changed')} of {facts.get('rows')}"]]
    quartiles = moved.get("cosine_quartiles") or []
    if len(quartiles) == 5:
        rows.append(
            [
                "cosine to the old row: least, median, most",
                ", ".join(f"{quartiles[i]:.2f}" for i in (0, 2, 4)),
            ]
        )
    rows.append(["rows that now draw like another", str(moved.get("colliding"))])
    rows.append(["rows without direction", str(moved.get("dead"))])
    for name, share in _tree(facts, "usage").items():
        rows.append([f"tokens of {clean(name)} pictures that are changed", percent(number(share))])
    if spectrum := facts.get("spectrum"):
        rows.append(
            ["energy of the harmful directions", ", ".join(f"{100 * e:.0f}%" for e in spectrum[:6])]
        )
    for pair, angles in _tree(facts, "principal_angles").items():
        rows.append(
            [f"angles between {clean(pair)}", ", ".join(f"{angle:.0f}°" for angle in angles)]
        )
    return _grid("What the edit changed", ["", ""], rows)
