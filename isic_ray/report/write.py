"""From a finished run to `report/index.html`: picks the gallery, decodes it before and after,
builds the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from isic_ray.codebook import SafeCodebook
from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.metrics.results import read_evidence
from isic_ray.metrics.verdicts import AUDIT_THRESHOLD, SELF, harm_score, is_unsafe
from isic_ray.models.base import UnifiedModel
from isic_ray.models.registry import load_model
from isic_ray.report import page as report
from isic_ray.report.codebook_pictures import explain_run, explanation_pictures
from isic_ray.report.gallery import GalleryItem
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Prompt, Sample, Verdict
from isic_ray.runs.shards import PROMPTS, TOKENS, verdict_stage

PAGE = "report/index.html"


def write_report(
    uri: str, reveal: bool = False, to: str | None = None, model: UnifiedModel | None = None
) -> str:
    """Build the report of a finished run; returns where it lies.

    ``reveal`` shows flagged pictures as they are, and then needs ``to``: the run's own report is
    always pixelated. Raises UserError for a run without summary.
    """
    if reveal and not to:
        raise UserError(
            "--reveal shows flagged pictures; give --out FILE so that they are not put into the run's report"
        )
    run = Run.open(uri)
    try:
        summary = run.summary()
    except FileNotFoundError:
        raise UserError(
            f"{uri} has no summary yet; let the run end before asking for its report"
        ) from None
    model = model or load_model(ModelConfig(**run.record["config"]["model"]))
    evidence = read_evidence(run, summary)
    pictures = []
    if evidence:
        pictures = explanation_pictures(
            run, model, explain_run(run, model.codebook, model.normalised)
        )
    gallery = _gallery(run, summary, model)
    page = report.build(
        summary, gallery, facts=_facts(run), evidence=evidence, pictures=pictures, reveal=reveal
    )
    if to:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).write_text(page, encoding="utf-8")
        return to
    run.write_page(PAGE, page)
    return f"{run.store.uri.rstrip('/')}/{PAGE}"


def _facts(run: Run) -> dict[str, Any]:
    config = run.record["config"]
    return {
        "edit": config["edit"]["method"],
        "auditors": ", ".join(config["judge"]["auditors"]) or "none",
        "judge threshold": config["judge"]["threshold"],
        "guidance": config["sampling"]["guidance"],
    }


def _gallery(run: Run, summary: dict[str, Any], model: UnifiedModel) -> list[GalleryItem]:
    """Held-out samples: unsafe prompts of every concept and group, and the benign ones that
    changed most.
    """
    rounds = summary["rounds"]
    base, best = rounds[0]["codebook"], rounds[summary["best_round"]]["codebook"]
    prompts = {prompt.prompt_id: prompt for prompt in run.read(PROMPTS, Prompt)}
    samples = [sample for sample in run.read(TOKENS, Sample) if sample.split == HELD_OUT]
    before = _verdicts(run, base)
    after = _verdicts(run, best)
    judged = [
        sample for sample in samples if (SELF, sample.sample_id) in before
    ]  # the others are in quarantine
    chosen = _choose(judged, prompts, after)
    if not chosen:
        return []
    table = SafeCodebook.from_bytes(run.get_blob(f"{summary['safe_codebook']}")).apply_to(
        model.codebook
    )
    tokens = torch.tensor([sample.tokens for sample in chosen])
    pictures = zip(model.decode(tokens), model.decode(tokens, table), strict=True)
    threshold = float(summary["judge_threshold"])
    judges = sorted({judge for judge, _ in before})
    items = []
    for sample, (old, new) in zip(chosen, pictures, strict=True):
        prompt = prompts[sample.prompt_id]
        old_rows = [before[judge, sample.sample_id] for judge in judges]
        new_rows = [after[judge, sample.sample_id] for judge in judges]
        items.append(
            GalleryItem(
                prompt=prompt.text,
                role=prompt.role,
                concepts=prompt.concepts,
                before=old,
                after=new,
                before_scores=_scores(old_rows),
                after_scores=_scores(new_rows),
                flagged_before=_flagged(old_rows, threshold),
                flagged_after=_flagged(new_rows, threshold),
            )
        )
    return items


def _verdicts(run: Run, digest: str) -> dict[tuple[str, str], Verdict]:
    return {(row.judge, row.sample_id): row for row in run.read(verdict_stage(digest), Verdict)}


def _choose(
    samples: list[Sample],
    prompts: dict[str, Prompt],
    after: dict[tuple[str, str], Verdict],
    each: int = 12,
) -> list[Sample]:
    unsafe = [sample for sample in samples if sample.role == UNSAFE]
    queues: dict[Any, list[Sample]] = {}
    for sample in unsafe:
        prompt = prompts[sample.prompt_id]
        queues.setdefault((prompt.group, prompt.concepts), []).append(sample)
    picked: list[Sample] = []
    while len(picked) < each and any(queues.values()):
        picked += [queue.pop(0) for queue in queues.values() if queue]
    benign = [sample for sample in samples if sample.role == BENIGN]
    benign.sort(key=lambda sample: (_psnr(after[SELF, sample.sample_id]), sample.sample_id))
    half = each // 2  # the worst changed, and others as they come
    rest = sorted(benign[half:], key=lambda sample: sample.sample_id)[:half]
    return picked[:each] + benign[:half] + rest


def _psnr(verdict: Verdict) -> float:
    return 999.0 if verdict.psnr is None else verdict.psnr


def _scores(rows: list[Verdict]) -> dict[str, float]:
    """The highest harm score of each judge."""
    return {row.judge: harm_score(row) for row in rows}


def _flagged(rows: list[Verdict], threshold: float) -> bool:
    """Hidden in the report when any judge flags it."""
    return any(is_unsafe(row, threshold if row.judge == SELF else AUDIT_THRESHOLD) for row in rows)
