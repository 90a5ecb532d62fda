"""Round 0 alone: mass sampling, self-judging and pairing. A run or a sweep can go on from what it leaves."""

from __future__ import annotations

from dataclasses import asdict

from isic_ray.config import RunConfig
from isic_ray.execution.cluster import connected
from isic_ray.execution.loop import IsicLoop, Record
from isic_ray.execution.progress import Progress
from isic_ray.models.base import ModelFacts
from isic_ray.models.registry import read_facts
from isic_ray.plan import PROMPTS
from isic_ray.prompts import load_prompts, prompts_digest
from isic_ray.runs import Run, fingerprint
from isic_ray.schema import Prompt


def generate(config: RunConfig, out: str, verbose: bool = False) -> Record:
    """Draw, judge and pair every prompt of ``config`` into the run at ``out``; returns the record of round 0."""
    prompts, facts = load_prompts(config.prompts), read_facts(config.model)
    run = create_run(config, out, prompts, facts)
    with connected(config.execution, verbose):
        return IsicLoop(config, run, prompts, facts, Progress()).generate()


def create_run(
    config: RunConfig, out: str, prompts: list[Prompt], facts: ModelFacts, more: Record | None = None
) -> Run:
    """The run at ``out``, created or resumed, with its prompts committed; ``more`` goes into its record."""
    run = Run.create_or_resume(
        out,
        {
            "config": asdict(config),
            "fingerprint": fingerprint(config),
            "model_digest": facts.weights_digest,
            "prompts_digest": prompts_digest(prompts),
            "plan": {"shard_size": config.execution.shard_size, "prompts": len(prompts)},
            **(more or {}),
        },
    )
    run.commit(PROMPTS, "all", prompts, Prompt)
    return run
