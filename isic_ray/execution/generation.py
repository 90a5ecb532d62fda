"""Round 0 alone: mass sampling, self-judging and pairing. A run or a sweep can go on from what it leaves."""

from __future__ import annotations

from isic_ray.config import RunConfig
from isic_ray.execution.cluster import connected
from isic_ray.execution.loop import IsicLoop, create_run
from isic_ray.execution.progress import Progress
from isic_ray.execution.stages import Record
from isic_ray.models.registry import read_facts
from isic_ray.prompts import load_prompts


def generate(config: RunConfig, out: str, verbose: bool = False) -> Record:
    """Draw, judge and pair every prompt of ``config`` into the run at ``out``; returns the record of round 0."""
    prompts, facts = load_prompts(config.prompts), read_facts(config.model)
    run = create_run(config, out, prompts, facts)
    with connected(config.execution, verbose):
        return IsicLoop(config, run, prompts, facts, Progress()).generate()
