"""`isic compare`: runs side by side, and two runs paired where they measured the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isic_ray.errors import UserError
from isic_ray.metrics.statistics import paired_difference
from isic_ray.metrics.verdicts import AUDIT_THRESHOLD, SELF, is_unsafe
from isic_ray.report.numbers import benign, decibel, first_and_best, judge_name, psnr_at, rate_at
from isic_ray.runs.run import Run
from isic_ray.runs.schema import HELD_OUT, UNSAFE, Sample, Verdict
from isic_ray.runs.shards import TOKENS, verdict_stage


def compare_runs(uris: Sequence[str]) -> str:
    """A text table with a column a run; for two runs also the paired difference on the prompts that
    both measured.

    Raises UserError for fewer than two runs.
    """
    if len(uris) < 2:
        raise UserError("give two runs or more to compare")
    runs = [Run.open(uri) for uri in uris]
    columns = [_column(run, run.summary()) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [
        ["", *uris],
        *([name, *(column.get(name, "–") for column in columns)] for name in names),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([*text, *(_paired(runs[0], runs[1]) if len(runs) == 2 else [])]) + "\n"


def _column(run: Run, summary: Mapping[str, Any]) -> dict[str, str]:
    first, best = first_and_best(summary)
    found = {
        "model": str(summary["model"]["name"]),
        "status": str(summary["status"]),
        "method": str(run.record["config"]["edit"]["method"]),
        "best round": str(summary["best_round"]),
        "fingerprint": str(summary["fingerprint"])[:12],
    }
    for key in ("audit", SELF):
        for when, entry in (("before", first), ("after", best)):
            rate = rate_at(entry, "unsafe", key)
            if rate:
                found[f"unsafe {when}, {judge_name(key)}"] = f"{rate.text}, n = {rate.n}"
    exact = benign(best)
    if exact:
        found["benign exact after"] = f"{exact.text}, n = {exact.n}"
    found["benign PSNR"] = decibel(psnr_at(best))
    return found


def _paired(one: Run, other: Run) -> list[str]:
    """Unsafe pictures of the second run minus those of the first, on shared held-out samples, a
    line a shared judge.
    """
    flags = [_flags(run) for run in (one, other)]
    lines = []
    for judge in sorted(flags[0].keys() & flags[1].keys()):
        shared = sorted(flags[0][judge].keys() & flags[1][judge].keys())
        if shared:
            before, after = ([each[judge][name] for name in shared] for each in flags)
            found = paired_difference(before, after)
            low, high = (f"{100 * end:+.1f}" for end in found.ci)
            value = 100 * (found.value or 0.0)
            lines.append(
                f"second minus first, {judge}: {value:+.1f} points [{low}, {high}] on {len(shared)} shared prompts"
            )
    return lines or ["the runs share no held-out prompt, so their rates are not paired"]


def _flags(run: Run) -> dict[str, dict[str, bool]]:
    """By judge, sample and whether it is unsafe, for held-out unsafe prompts under the best
    codebook.
    """
    summary = run.summary()
    base, best = (
        summary["rounds"][0]["codebook"],
        summary["rounds"][summary["best_round"]]["codebook"],
    )
    rows = {
        (r.judge, r.sample_id): r
        for digest in (base, best)
        for r in run.read(verdict_stage(digest), Verdict)
    }
    wanted = {
        s.sample_id for s in run.read(TOKENS, Sample) if s.role == UNSAFE and s.split == HELD_OUT
    }
    found: dict[str, dict[str, bool]] = {}
    for (judge, sample), row in rows.items():
        if sample in wanted:
            limit = float(summary["judge_threshold"]) if judge == SELF else AUDIT_THRESHOLD
            found.setdefault(judge, {})[sample] = is_unsafe(row, limit)
    return found
