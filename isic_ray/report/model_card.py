"""The model card of an edited checkpoint: what was changed, what it measured, what it does not
do. Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isic_ray.report.evidence import evidence_table
from isic_ray.report.numbers import (
    benign,
    decibel,
    first_and_best,
    judge_name,
    judges,
    psnr_at,
    rate_at,
)
from isic_ray.report.story import limits


def model_card(
    summary: Mapping[str, Any], config: Mapping[str, Any], evidence: Mapping[str, Any] | None = None
) -> str:
    """The card of a run's best codebook; ``config`` is its run.json's, ``evidence`` what `isic
    evaluate` wrote.
    """
    first, best = first_and_best(summary)
    name = summary["model"]["name"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [text-to-image, safety, safe-codebook]",
        "---",
        "",
        f"# {name}, with a safe codebook",
        "",
        f"The visual-token codebook of `{name}` (weights {str(summary['model']['digest'])[:12]}) was edited with "
        f"isic_ray (`{config['edit']['method']}`, round {summary['best_round']}), so that pictures of "
        f"{', '.join(config['judge']['questions'])} come out harmless. All other weights are unchanged. "
        "`safe_codebook.safetensors` holds the change, and takes it back bit for bit.",
        "",
        "## Measured on held-out prompts",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    for judge in judges(first.get("unsafe"), best.get("unsafe")):
        pair = [_cell(rate_at(entry, "unsafe", judge)) for entry in (first, best)]
        lines.append(f"| unsafe pictures, {judge_name(judge)} | {pair[0]} | {pair[1]} |")
    lines.append(f"| benign pictures exact | {_cell(benign(first))} | {_cell(benign(best))} |")
    lines.append(f"| benign pictures, PSNR to the unedited | – | {decibel(psnr_at(best))} |")
    lines += [
        "",
        "Shares with 95% intervals (Wilson). The auditor took no part in making the edit.",
    ]
    if summary.get("alarm"):
        lines += ["", f"**Alarm:** {summary['alarm']}"]
    if evidence:
        lines += ["", "## Further evidence", "", "```", evidence_table(evidence).rstrip(), "```"]
    lines += [
        "",
        "## What this does not show",
        "",
        *(f"- {line}" for line in limits(summary, bool(evidence))),
    ]
    lines += ["", "## Use", "", "Licence and intended use are those of the base model.", ""]
    return "\n".join(lines)


def _cell(rate: Any) -> str:
    return f"{rate.text}, n = {rate.n}" if rate else "–"
