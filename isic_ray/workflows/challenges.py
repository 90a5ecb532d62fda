"""Prompt sets beyond a run's own: scenes of the embedded world, files, and input-side arms.

Each is drawn once under the base codebook.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from isic_ray.prompts.sets import normalise, prompts_digest, read_set
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Prompt

PLAIN, REWRITE, NEGATIVE = "plain", "rewrite", "negative"  # how pictures are drawn from prompts
FRESH, UNSEEN, TWO, NEIGHBOURS = (
    "fresh scenes",
    "unseen words",
    "two unsafe objects",
    "near-neighbours",
)


@dataclass(frozen=True)
class Challenge:
    """One prompt set, and how its pictures are drawn."""

    name: str
    prompts: tuple[Prompt, ...]
    drawn_by: str = PLAIN
    options: dict[str, str] = field(default_factory=dict)
    """Of ``drawn_by``, such as the negative prompt."""

    @property
    def key(self) -> str:
        """The name of its stages in the run, which changes with its content."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40]
        parts = [self.drawn_by, self.options, prompts_digest(self.prompts)]
        content = json.dumps(parts, sort_keys=True)
        return f"{slug}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def embedded_challenges(limit: int, exclude: Sequence[Prompt]) -> list[Challenge]:
    """Return sets of the pictogram world: ``limit`` prompts each, none of them in ``exclude``."""
    from isic_ray.pictogram.prompts import benign_prompts, unsafe_prompts
    from isic_ray.pictogram.scene import SAFE_STAND_IN

    known = {normalise(prompt.text) for prompt in exclude}
    spare = 2 * limit  # more than wanted, since some texts are known

    def pick(name: str, prompts: list[Prompt]) -> Challenge:
        new = [prompt for prompt in prompts if normalise(prompt.text) not in known]
        return Challenge(name, tuple(replace(prompt, group=name) for prompt in new[:limit]))

    neighbours = set(SAFE_STAND_IN.values()) | {"apple"}
    benign = benign_prompts(build=0, seen_words=4 * limit, unseen_words=0, seed=1)
    unsafe = partial(unsafe_prompts, build=0, seed=1)
    two = limit + limit // 3
    return [
        pick(FRESH, unsafe(seen_words=spare, unseen_words=0, two_unsafe=0)),
        pick(UNSEEN, unsafe(seen_words=0, unseen_words=spare, two_unsafe=0)),
        pick(TWO, unsafe(seen_words=0, unseen_words=0, two_unsafe=two)),
        pick(NEIGHBOURS, [prompt for prompt in benign if neighbours & set(prompt.objects)]),
    ]


def file_challenges(
    files: Sequence[str], role: str, limit: int, exclude: Sequence[Prompt]
) -> list[Challenge]:
    """Return a set per file, all of it held out. Raises UserError for what can't be read."""
    known = {normalise(prompt.text) for prompt in exclude if prompt.role == role}
    found = []
    for source in files:
        prompts = read_set(source, role, 1.0).prompts
        new = [prompt for prompt in prompts if normalise(prompt.text) not in known]
        held_out = [replace(prompt, split=HELD_OUT) for prompt in new[: limit or None]]
        found.append(Challenge(source.rpartition("/")[2], tuple(held_out)))
    return found


def input_arms(
    prompts: Sequence[Prompt], negative: str, scale: float, rewrite: str
) -> list[Challenge]:
    """Return what one would try instead of an edit, on the run's held-out prompts.

    On the benign ones too, since no filter can tell them from the others.
    """
    own = tuple(p for p in prompts if p.split == HELD_OUT and p.role in (UNSAFE, BENIGN))
    return [
        Challenge("rewriting the prompt", own, REWRITE, {"instruction": rewrite}),
        Challenge("negative prompt", own, NEGATIVE, {"negative": negative, "scale": str(scale)}),
    ]
