"""The words of the report: headline, the four answers, limits. Numbers are quoted, never made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from isic_ray.metrics.statistics import Rate
from isic_ray.metrics.summary import AUDIT, SELF, Figures, Round, Summary
from isic_ray.report.html import clean
from isic_ray.report.numbers import (
    decibel,
    interval,
    judge_name,
    judges,
    p_value,
    percent,
    point,
    trusted,
    with_interval,
)


@dataclass(frozen=True)
class Tile:
    """One of the four answers of the first screen; "" and () are parts that it does not have."""

    question: str
    figure: str = ""
    what: str = ""
    lines: Sequence[str] = ()
    rows: Sequence[tuple[str, str, str, bool]] = ()
    """(name, unsafe, exact, is this run)."""


@dataclass(frozen=True)
class Compared:
    """A line of the comparison with other edits."""

    name: str
    figures: Figures
    this_run: bool = False


def headline(summary: Summary) -> Markup:
    """Return one sentence: how much safer, at what cost."""
    first, best = summary.first, summary.best
    before, after = trusted(first.figures.unsafe), trusted(best.figures.unsafe)
    if before is None or after is None or before.rate is None or after.rate is None:
        return Markup("This run holds no measured unsafe rate yet.")
    if best is first:
        return Markup(
            "No edit was kept: <b>{}</b> of the pictures for unsafe prompts are unsafe, as before."
        ).format(point(before))
    text = Markup("Unsafe pictures {}").format(_move(before, after))
    exact_before, exact_after = (trusted(each.figures.benign.exact) for each in (first, best))
    if exact_before is None or exact_after is None or exact_after.rate is None:
        return text + "."
    cost = Markup("{}; <b>{}</b> of benign pictures show exactly what was asked, {} before.")
    return cost.format(text, point(exact_after), point(exact_before))


def _move(before: Rate, after: Rate) -> Markup:
    if point(before) == point(after):
        return Markup("stayed at <b>{}</b>").format(point(after))
    fell = (after.rate or 0.0) < (before.rate or 0.0)
    return Markup("{} from <b>{}</b> to <b>{}</b>").format(
        "fell" if fell else "rose", point(before), point(after)
    )


def standfirst(summary: Summary) -> str:
    """Return the line below the headline: who judged how many pictures, and how."""
    figures = summary.best.figures
    rate, exact = trusted(figures.unsafe), trusted(figures.benign.exact)
    if rate is None:
        return ""
    judge = judges(figures.unsafe)[0]
    who = {
        AUDIT: "an independent auditor that never steers the edit",
        SELF: "the model itself; no auditor took part",
    }.get(judge, judge)
    count = f"{rate.n} pictures of held-out unsafe prompts"
    count += f" and {exact.n} of benign ones" if exact is not None else ""
    return f"{count}, the same samples before and after. Judged by {clean(who)}."


def tiles(summary: Summary, compared: Sequence[Compared]) -> list[Tile]:
    """Return the four answers of the first screen, without those that have no numbers."""
    first, best = summary.first, summary.best
    found = [_safer(first, best), _cost(first, best), _sure(first, best), _against(compared)]
    return [tile for tile in found if tile]


def _safer(first: Round, best: Round) -> Tile | None:
    old, new = first.figures.unsafe, best.figures.unsafe
    names = judges(old, new)
    if not names:
        return None
    lines = [
        f"{judge_name(name).capitalize()}: "
        f"{with_interval(old.get(name))} → {with_interval(new.get(name))}"
        for name in names
    ]
    figure = f"{point(trusted(old))} → {point(trusted(new))}"
    return Tile("How much safer?", figure, "unsafe pictures", _tight(lines))


def _cost(first: Round, best: Round) -> Tile | None:
    benign = best.figures.benign
    before, after = trusted(first.figures.benign.exact), trusted(benign.exact)
    if before is None and after is None and benign.psnr is None:
        return None
    lines = [f"After the edit {with_interval(after)}, {_n(after)}"] if after else []
    if benign.psnr is not None:
        lines.append(f"Benign pictures lie {decibel(benign.psnr)} PSNR from the originals")
    for name, rate in benign.flagged.items():
        lines.append(f"Benign pictures flagged by {judge_name(name)}: {with_interval(rate)}")
    figure = f"{point(before)} → {point(after)}"
    return Tile("At what cost?", figure, "benign pictures exact", _tight(lines))


def _sure(first: Round, best: Round) -> Tile | None:
    before, after = trusted(first.figures.unsafe), trusted(best.figures.unsafe)
    if after is None:
        return None
    edited = best is not first
    when = " after the edit" if edited else ""
    lines = [f"95% interval of the unsafe rate{when}, {_n(after)}"]
    if before is not None and edited:
        clear = after.ci[1] < before.ci[0] or before.ci[1] < after.ci[0]
        lines.append(
            f"Clear of the interval before, {interval(before)}"
            if clear
            else f"Overlaps the interval before, {interval(before)}: this may be chance"
        )
    if best.test:
        counts = f"{best.test.fixed} made safe, {best.test.broken} made unsafe"
        p = p_value(best.test.p).replace(" ", "\u00a0")
        lines.append(f"Paired exact test of this round, self-judge: {counts}, {p}")
    figure = f"{100 * after.ci[0]:.1f} – {percent(after.ci[1])}"
    return Tile("How sure?", figure, "range for the unsafe rate", _tight(lines))


def _against(compared: Sequence[Compared]) -> Tile | None:
    if len(compared) < 2 or not any(each.figures.unsafe for each in compared):
        return None
    chosen = compared if len(compared) <= 6 else [*compared[:5], compared[-1]]
    rows = [
        (
            each.name,
            point(trusted(each.figures.unsafe)),
            point(trusted(each.figures.benign.exact)),
            each.this_run,
        )
        for each in chosen
    ]
    return Tile("Compared with what?", rows=rows)


def _tight(lines: Sequence[str]) -> list[str]:
    """Return the lines with intervals that do not break."""
    return [re.sub(r"(\[[\d.-]+,) ([\d.-]+\])", "\\1\u00a0\\2", line) for line in lines]


def _n(rate: Rate) -> str:
    return f"n\u00a0=\u00a0{rate.n}"


def compared(summary: Summary, arms: Mapping[str, Figures]) -> list[Compared]:
    """Return what is compared, from no edit over the arms to the best round."""
    first, best = summary.first, summary.best
    found = [Compared("no edit", first.figures)]
    found += [Compared(clean(name), figures) for name, figures in arms.items()]
    if best is not first:
        found.append(Compared(f"this run, round {best.round}", best.figures, this_run=True))
    return found


def limits(summary: Summary, attacked: bool = False) -> list[str]:
    """Return what the numbers do not say; ``attacked``: whether the edit was attacked."""
    unsafe = summary.best.figures.unsafe
    rate = trusted(unsafe)
    attacks = (
        "Stronger attacks than those shown exist."
        if attacked
        else "Adaptive attacks were not tried."
    )
    found = [
        f"The rates hold for the prompts and seeds that were drawn. {attacks}",
        "Rounds were kept, and the best one was chosen, by what the model says of these held-out "
        "prompts: its own rate is therefore somewhat too good. The auditor's rate took no part in "
        "the choice.",
        "Intervals treat pictures as independent and cover the choice of prompts only, not another "
        "training or model.",
        "An edited codebook changes what the decoder can draw, not what the language model plans. "
        "Anyone who holds the original codebook can undo the edit.",
    ]
    if AUDIT not in unsafe:
        found.insert(1, "No independent auditor took part: the model judged its own pictures.")
    elif not summary.calibration:
        found.insert(2, "The auditor errs too; this run did not measure by how much.")
    if rate is not None and rate.n < 100:
        found.insert(0, f"Only {rate.n} unsafe samples: differences of a few points mean nothing.")
    if "pictogram" in (summary.model.name or summary.model.family):
        found.append(
            "Unsafe concepts of the pictogram world are harmless drawn stand-ins. They show that "
            "the method works, not how well it would on photographs."
        )
    return found


def facts(summary: Summary, extra: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return how it was measured, as (name, value): from the summary, then the caller's own."""
    found: dict[str, object] = {
        "status": summary.status,
        "model name": summary.model.name,
        "model family": summary.model.family,
        "model digest": summary.model.digest,
        "fingerprint": summary.fingerprint,
        "judge threshold": summary.judge_threshold,
        "safe codebook": summary.safe_codebook,
    }
    pairs = [*found.items(), *extra.items()]
    return [(clean(name.replace("_", " ")), clean(value)) for name, value in pairs]
