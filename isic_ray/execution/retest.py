"""The last test of a sweep: its chosen codebook against the starting configuration's, on prompts that no trial saw."""

from __future__ import annotations

import numpy as np

from isic_ray import metrics
from isic_ray.evaluation import SELF
from isic_ray.execution.loop import IsicLoop, create_run
from isic_ray.execution.progress import Progress
from isic_ray.execution.stages import Record
from isic_ray.models.base import ModelFacts
from isic_ray.plan import codebook_blob
from isic_ray.runs import Run
from isic_ray.schema import BENIGN, HELD_OUT, UNSAFE, Prompt
from isic_ray.sweep_config import SweepConfig


def retest(
    sweep: SweepConfig,
    out: str,
    fresh: list[Prompt],
    facts: ModelFacts,
    codebooks: dict[str, str],
    progress: Progress,
) -> Record:
    """Figures of the codebooks "best" and "start" (digests) on ``fresh``, and paired differences best - start."""
    config = sweep.start()
    run = create_run(config, f"{out}/retest", fresh, facts)
    shared = Run.open(f"{out}/shared")
    loop = IsicLoop(config, run, fresh, facts, progress)
    loop.work("retest: draw and judge", [{"do": "draw", "shard": s.name, "codebook": ""} for s in loop.shards])
    loop.load()
    for digest in codebooks.values():
        if digest != loop.base_digest:
            run.put_blob(codebook_blob(digest), shared.get_blob(codebook_blob(digest)))
    loop.judge(list(codebooks.values()), loop.shards, "retest: judge again")
    evidence = {name: loop.evidence(digest, HELD_OUT) for name, digest in codebooks.items()}
    result: Record = {"before": loop.evidence(loop.base_digest, HELD_OUT).figures()}
    result |= {name: found.figures() for name, found in evidence.items()}
    for judge in (SELF, *config.judge.auditors[:1]):
        for role, flags in ((UNSAFE, "unsafe"), (BENIGN, "faithful")):
            samples = evidence["start"].select(role, HELD_OUT)
            start, best = (np.array(getattr(evidence[name], flags)(judge, samples)) for name in ("start", "best"))
            name = "self" if judge == SELF else "audit"
            result[f"difference_{role}_{name}"] = metrics.paired_difference(start, best).to_dict()
    return result
