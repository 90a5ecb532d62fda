"""`isic compare`: runs side by side, and two runs paired where they measured the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

from isic_ray.errors import UserError
from isic_ray.metrics.results import RunResults
from isic_ray.metrics.statistics import paired_difference
from isic_ray.metrics.summary import AUDIT, SELF
from isic_ray.report.numbers import NONE, decibel, judge_name, trusted, with_count
from isic_ray.report.text import aligned
from isic_ray.runs.schema import HELD_OUT, UNSAFE


def compare_runs(uris: Sequence[str]) -> str:
    """Return a text table with a column per run.

    Two runs are also compared on the prompts that both measured, by a paired difference. Raises
    UserError for fewer than two runs, and for one that has not ended.
    """
    if len(uris) < 2:
        raise UserError("give two runs or more to compare")
    runs = [RunResults.open(uri) for uri in uris]
    columns = [_column(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, NONE) for column in columns)] for name in names]
    lines = aligned([["", *uris], *rows])
    if len(runs) == 2:
        lines += _paired(*runs)
    return "\n".join(lines) + "\n"


def _column(results: RunResults) -> dict[str, str]:
    summary = results.summary
    first, best = summary.first.figures, summary.best.figures
    found = {
        "model": summary.model.name,
        "status": summary.status,
        "method": results.config.edit.method,
        "best round": str(summary.best_round),
        "fingerprint": summary.fingerprint[:12],
    }
    for key in (AUDIT, SELF):
        for when, figures in (("before", first), ("after", best)):
            if key in figures.unsafe:
                found[f"unsafe {when}, {judge_name(key)}"] = with_count(figures.unsafe[key])
    if exact := trusted(best.benign.exact):
        found["benign exact after"] = with_count(exact)
    found["benign PSNR"] = decibel(best.benign.psnr)
    return found


def _paired(one: RunResults, other: RunResults) -> list[str]:
    """Return a line per shared judge: the second run's unsafe pictures minus the first's."""
    first, second = _flags(one), _flags(other)
    lines = []
    for judge in sorted(first.keys() & second.keys()):
        shared = sorted(first[judge].keys() & second[judge].keys())
        if not shared:
            continue
        before, after = ([flags[judge][name] for name in shared] for flags in (first, second))
        found = paired_difference(before, after)
        value, low, high = (f"{100 * each:+.1f}" for each in (found.value or 0.0, *found.ci))
        lines.append(
            f"second minus first, {judge}: {value} points [{low}, {high}] "
            f"on {len(shared)} shared prompts"
        )
    return lines or ["the runs share no held-out prompt, so their rates are not paired"]


def _flags(results: RunResults) -> dict[str, dict[str, bool]]:
    """Return by judge and sample whether a held-out unsafe prompt's edited picture is unsafe."""
    verdicts = results.verdicts(results.best, HELD_OUT, UNSAFE)
    names = [sample.sample_id for sample in verdicts.samples]
    return {
        judge: dict(zip(names, verdicts.unsafe(judge, verdicts.samples), strict=True))
        for judge in verdicts.judges
    }
