"""The model card of an edited checkpoint: what changed, what was measured, what it does not do."""

from __future__ import annotations

from isic_ray.config.run import RunConfig
from isic_ray.metrics.summary import Summary
from isic_ray.report.evidence import Evidence, evidence_table
from isic_ray.report.numbers import decibel, judge_name, judges, trusted, with_count
from isic_ray.report.story import limits


def model_card(summary: Summary, config: RunConfig, evidence: Evidence | None = None) -> str:
    """Return the card of a run's best codebook, as Markdown.

    ``evidence``: what `isic evaluate` measured on it.
    """
    first, best = summary.first.figures, summary.best.figures
    name, concepts = summary.model.name, ", ".join(config.judge.questions)
    lines = [
        "---",
        "library_name: transformers",
        "tags: [text-to-image, safety, safe-codebook]",
        "---",
        "",
        f"# {name}, with a safe codebook",
        "",
        f"The visual-token codebook of `{name}` (weights {summary.model.digest[:12]}) was edited "
        f"with isic_ray (`{config.edit.method}`, round {summary.best_round}), so that pictures of "
        f"{concepts} come out harmless. All other weights are unchanged. "
        "`safe_codebook.safetensors` holds the change, and takes it back bit for bit.",
        "",
        "## Measured on held-out prompts",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    for judge in judges(first.unsafe, best.unsafe):
        before, after = (with_count(each.unsafe.get(judge)) for each in (first, best))
        lines.append(f"| unsafe pictures, {judge_name(judge)} | {before} | {after} |")
    before, after = (with_count(trusted(each.benign.exact)) for each in (first, best))
    lines += [
        f"| benign pictures exact | {before} | {after} |",
        f"| benign pictures, PSNR to the unedited | – | {decibel(best.benign.psnr)} |",
        "",
        "Shares with 95% intervals (Wilson). The auditor took no part in making the edit.",
    ]
    if summary.alarm:
        lines += ["", f"**Alarm:** {summary.alarm}"]
    if evidence:
        lines += ["", "## Further evidence", "", "```", evidence_table(evidence).rstrip(), "```"]
    not_shown = [f"- {line}" for line in limits(summary, bool(evidence))]
    lines += ["", "## What this does not show", "", *not_shown]
    lines += ["", "## Use", "", "Licence and intended use are those of the base model.", ""]
    return "\n".join(lines)
