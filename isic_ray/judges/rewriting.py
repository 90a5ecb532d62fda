"""Ask a judge to rewrite unsafe prompts into minimally changed safe ones."""

from __future__ import annotations

from collections.abc import Sequence

from isic_ray.models.base import Judge


def rewrite_prompts(judge: Judge, prompts: Sequence[str], instruction: str) -> list[str]:
    """Return the judge's rewrite of each prompt; "" where it gave none, or changed nothing.

    ``instruction`` has a place for ``{prompt}``, as ``judge.rewrite`` in the settings.
    """
    answers = judge.rewrite(prompts, instruction) if prompts else []
    return [new if new != old else "" for old, new in zip(prompts, answers, strict=True)]
