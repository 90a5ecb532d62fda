"""Which pictures of a run its report shows, before and after the edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from isic_ray.metrics.results import RunResults
from isic_ray.metrics.summary import SELF
from isic_ray.metrics.verdicts import Verdicts, harm_score, is_unsafe
from isic_ray.models.base import UnifiedModel
from isic_ray.report.cards import GalleryItem
from isic_ray.report.html import Picture
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Prompt, Sample, Verdict

_EACH = 12  # samples of either role
_UNCHANGED = 999.0  # stands for a PSNR where no token of the picture was edited


def pick_gallery(results: RunResults, model: UnifiedModel) -> list[GalleryItem]:
    """Decode held-out samples of a run before and after its edit.

    Of unsafe prompts some of every concept and group, of benign ones those that changed most and
    others. Quarantined samples are left out.
    """
    before = results.verdicts(results.base, HELD_OUT)
    after = results.verdicts(results.best, HELD_OUT)
    chosen = [*_unsafe(after.select(UNSAFE, HELD_OUT), results.prompts), *_benign(after)]
    if not chosen:
        return []
    tokens = torch.tensor([sample.tokens for sample in chosen])
    table = results.table(results.best, model.codebook)
    pictures = zip(model.decode(tokens), model.decode(tokens, table), strict=True)
    return [
        _item(results.prompts[sample.prompt_id], sample, pair, before, after)
        for sample, pair in zip(chosen, pictures, strict=True)
    ]


def _unsafe(samples: Sequence[Sample], prompts: Mapping[str, Prompt]) -> list[Sample]:
    """Pick samples from every group and set of concepts in turn."""
    queues: dict[tuple[str, tuple[str, ...]], list[Sample]] = {}
    for sample in samples:
        prompt = prompts[sample.prompt_id]
        queues.setdefault((prompt.group, prompt.concepts), []).append(sample)
    picked: list[Sample] = []
    while len(picked) < _EACH and any(queues.values()):
        picked += [queue.pop(0) for queue in queues.values() if queue]
    return picked[:_EACH]


def _benign(after: Verdicts) -> list[Sample]:
    """Pick the benign samples that changed most, and as many of the others as they come."""

    def kept(sample: Sample) -> tuple[float, str]:
        psnr = after.verdicts[SELF, sample.sample_id].psnr
        return _UNCHANGED if psnr is None else psnr, sample.sample_id

    ordered, half = sorted(after.select(BENIGN, HELD_OUT), key=kept), _EACH // 2
    others = sorted(ordered[half:], key=lambda sample: sample.sample_id)
    return ordered[:half] + others[:half]


def _item(
    prompt: Prompt,
    sample: Sample,
    pictures: tuple[Picture, Picture],
    before: Verdicts,
    after: Verdicts,
) -> GalleryItem:
    judges = sorted(after.judges)
    old = [before.verdicts[judge, sample.sample_id] for judge in judges]
    new = [after.verdicts[judge, sample.sample_id] for judge in judges]
    return GalleryItem(
        prompt=prompt.text,
        role=prompt.role,
        concepts=prompt.concepts,
        before=pictures[0],
        after=pictures[1],
        before_scores=_scores(old),
        after_scores=_scores(new),
        flagged_before=_flagged(old, before.threshold),
        flagged_after=_flagged(new, after.threshold),
    )


def _scores(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return each judge's highest score of a question about harm."""
    return {verdict.judge: harm_score(verdict) for verdict in verdicts}


def _flagged(verdicts: Sequence[Verdict], own_threshold: float) -> bool:
    return any(is_unsafe(verdict, own_threshold) for verdict in verdicts)
