"""The words of the report: headline, the four answers, limits. Numbers are quoted from the
summary, never invented.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from isic_ray.report.gallery import clean
from isic_ray.report.numbers import (
    NONE,
    Shown,
    arms,
    at,
    benign,
    decibel,
    first_and_best,
    judge_name,
    judges,
    number,
    p_value,
    percent,
    psnr_at,
    rate_at,
    rates,
    unsafe,
)

Tile = dict[str, Any]


def headline(summary: Mapping[str, Any]) -> Markup:
    """One sentence: how much safer, at what cost."""
    first, best = first_and_best(summary)
    before, after = unsafe(first), unsafe(best)
    if before is None or after is None or before.value is None or after.value is None:
        return Markup("This run holds no measured unsafe rate yet.")
    if best is first:
        return Markup(
            "No edit was kept: <b>{}</b> of the pictures for unsafe prompts are unsafe, as before."
        ).format(before.percent)
    text = Markup("Unsafe pictures {}.").format(_move(before, after))
    exact_before, exact_after = benign(first), benign(best)
    if exact_before is None or exact_after is None or exact_after.value is None:
        return text
    cost = Markup("{}; <b>{}</b> of benign pictures show exactly what was asked, {} before.")
    return cost.format(text[:-1], exact_after.percent, exact_before.percent)


def _move(before: Shown, after: Shown) -> Markup:
    if before.percent == after.percent:
        return Markup("stayed at <b>{}</b>").format(after.percent)
    fell = (after.value or 0.0) < (before.value or 0.0)
    return Markup("{} from <b>{}</b> to <b>{}</b>").format(
        "fell" if fell else "rose", before.percent, after.percent
    )


def standfirst(summary: Mapping[str, Any]) -> str:
    """The line below the headline: who judged how many pictures, and how they were compared."""
    first, best = first_and_best(summary)
    rate, exact = unsafe(best), benign(best)
    names = judges(at(best, "unsafe"), at(first, "unsafe"))
    if rate is None or not names:
        return ""
    who = {
        "audit": "an independent auditor that never steers the edit",
        "self": "the model itself; no auditor took part",
    }.get(names[0], names[0])
    count = (
        f"{rate.n} pictures of held-out unsafe prompts"
        if rate.n is not None
        else "Held-out unsafe prompts"
    )
    count += f" and {exact.n} of benign ones" if exact is not None and exact.n is not None else ""
    return f"{count}, the same samples before and after. Judged by {clean(who)}."


def tiles(summary: Mapping[str, Any]) -> list[Tile]:
    """The four answers of the first screen; those without numbers are left out."""
    first, best = first_and_best(summary)
    found = [
        _safer(first, best),
        _cost(first, best),
        _sure(first, best),
        _compared(summary, first, best),
    ]
    for tile in found:
        tile["lines"] = [_tight(line) for line in tile.get("lines", [])]
    return [tile for tile in found if "question" in tile]


def _tight(text: str) -> str:
    """Intervals that do not break across lines."""
    return re.sub(r"(\[[\d.-]+,) ([\d.-]+\])", "\\1\u00a0\\2", text)


def _safer(first: Mapping[str, Any], best: Mapping[str, Any]) -> Tile:
    names = judges(at(first, "unsafe"), at(best, "unsafe"))
    if not names:
        return {}
    lines = []
    for name in names:
        before, after = rate_at(first, "unsafe", name), rate_at(best, "unsafe", name)
        lines.append(
            f"{judge_name(name).capitalize()}: {before.text if before else NONE} → {after.text if after else NONE}"
        )
    before, after = unsafe(first), unsafe(best)
    figure = f"{before.percent if before else NONE} → {after.percent if after else NONE}"
    return {
        "question": "How much safer?",
        "figure": figure,
        "what": "unsafe pictures",
        "lines": lines,
    }


def _cost(first: Mapping[str, Any], best: Mapping[str, Any]) -> Tile:
    before, after = benign(first), benign(best)
    psnr, flagged = psnr_at(best), list(rates(at(best, "benign", "flagged")))
    if before is None and after is None and psnr is None:
        return {}
    lines = [f"After the edit {after.text}, {_n(after)}"] if after else []
    if psnr is not None:
        lines.append(f"Benign pictures lie {decibel(psnr)} PSNR from the originals")
    for name, rate in flagged if flagged else [("", rate_at(best, "benign", "flagged"))]:
        if rate is not None:
            lines.append(
                f"Benign pictures flagged{f' by {judge_name(name)}' if name else ''}: {rate.text}"
            )
    figure = f"{before.percent if before else NONE} → {after.percent if after else NONE}"
    return {
        "question": "At what cost?",
        "figure": figure,
        "what": "benign pictures exact",
        "lines": lines,
    }


def _sure(first: Mapping[str, Any], best: Mapping[str, Any]) -> Tile:
    before, after = unsafe(first), unsafe(best)
    if after is None or after.low is None or after.high is None:
        return {}
    lines = [
        f"95% interval of the unsafe rate{' after the edit' if best is not first else ''}, {_n(after)}"
    ]
    if (
        before is not None
        and before.low is not None
        and before.high is not None
        and best is not first
    ):
        clear = after.high < before.low or before.high < after.low
        lines.append(
            f"Clear of the interval before, {before.interval}"
            if clear
            else f"Overlaps the interval before, {before.interval}: this may be chance"
        )
    test = at(best, "test")
    if isinstance(test, Mapping) and number(test.get("p")) is not None:
        counts = f"{test.get('fixed', NONE)} made safe, {test.get('broken', NONE)} made unsafe"
        lines.append(f"Paired exact test of this round, self-judge: {counts}, {_p(test.get('p'))}")
    figure = f"{100 * after.low:.1f} – {percent(after.high)}"
    return {
        "question": "How sure?",
        "figure": figure,
        "what": "range for the unsafe rate",
        "lines": lines,
    }


def _p(value: Any) -> str:
    return p_value(number(value)).replace(" ", "\u00a0")


def _n(rate: Shown) -> str:
    return f"n\u00a0=\u00a0{NONE if rate.n is None else rate.n}"


def _compared(
    summary: Mapping[str, Any], first: Mapping[str, Any], best: Mapping[str, Any]
) -> Tile:
    every = arms_with_run(summary)
    if len(every) < 2 or not any(unsafe(entry) for _, entry, _ in every):
        return {}
    chosen = every if len(every) <= 6 else [*every[:5], every[-1]]
    found = [(name, unsafe(entry), benign(entry), strong) for name, entry, strong in chosen]
    rows = [
        (name, r.percent if r else NONE, e.percent if e else NONE, strong)
        for name, r, e, strong in found
    ]
    return {"question": "Compared with what?", "rows": rows, "lines": []}


def arms_with_run(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(name, numbers, is this run) from no edit over the other arms to the best round."""
    first, best = first_and_best(summary)
    others = arms(summary)
    found: list[tuple[str, Mapping[str, Any], bool]] = []
    if first and "none" not in others:
        found.append(("no edit", first, False))
    found += [
        ("no edit" if name == "none" else clean(name), arm, False) for name, arm in others.items()
    ]
    if best and best is not first:
        found.append((f"this run, round {clean(best.get('round', '?'))}", best, True))
    return found


def limits(summary: Mapping[str, Any], attacked: bool = False) -> list[str]:
    """What the numbers do not say; some sentences depend on what the summary holds, and on
    whether it was attacked.
    """
    _, best = first_and_best(summary)
    rate = unsafe(best)
    names = judges(at(best, "unsafe"))
    found = [
        "The rates hold for the prompts and seeds that were drawn. "
        + (
            "Stronger attacks than those shown exist."
            if attacked
            else "Adaptive attacks were not tried."
        ),
        "Rounds were kept, and the best one was chosen, by what the model says of these held-out prompts: its own rate "
        "is therefore somewhat too good. The auditor's rate took no part in the choice.",
        "Intervals treat pictures as independent and cover the choice of prompts only, not another training or model.",
        "An edited codebook changes what the decoder can draw, not what the language model plans. Whoever holds the "
        "original codebook can undo the edit.",
    ]
    if "audit" not in names:
        found.insert(1, "No independent auditor took part: the model judged its own pictures.")
    elif not isinstance(summary.get("calibration"), Mapping):
        found.insert(2, "The auditor errs too; this run did not measure by how much.")
    if rate is not None and rate.n is not None and rate.n < 100:
        found.insert(0, f"Only {rate.n} unsafe samples: differences of a few points mean nothing.")
    if "pictogram" in str(at(summary, "model", "name") or at(summary, "model", "family") or ""):
        found.append(
            "Unsafe concepts of the pictogram world are harmless drawn stand-ins. They show that the method works, "
            "not how well it would on photographs."
        )
    return found


def facts(summary: Mapping[str, Any], extra: Mapping[str, object]) -> list[tuple[str, str]]:
    """How it was measured, as (name, value): scalars of the summary and its model, then the
    caller's own.
    """
    known = {"schema", "status", "best_round", "alarm"}
    top = [(key, value) for key, value in summary.items() if key not in known]
    model = at(summary, "model")
    found = [
        ("status", summary.get("status")),
        *_scalars("model ", model),
        *_scalars("", dict(top)),
    ]
    found += extra.items()
    return [
        (clean(key.replace("_", " ")), clean(value)) for key, value in found if value is not None
    ]


def _scalars(prefix: str, tree: Any) -> list[tuple[str, object]]:
    if not isinstance(tree, Mapping):
        return []
    return [
        (prefix + str(key), value)
        for key, value in tree.items()
        if isinstance(value, str | int | float)
    ]
