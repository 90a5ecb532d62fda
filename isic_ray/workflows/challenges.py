"""Prompt sets beyond a run's own: fresh scenes, unseen words, compositions, near-neighbours, files,
input-side arms.

Each is drawn once under the base codebook; how its prompts are turned into pictures is its ``way``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from isic_ray.prompts.sets import normalise, prompts_digest, read_set
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Prompt

PLAIN, REWRITE, NEGATIVE = "plain", "rewrite", "negative"
FRESH, UNSEEN, TWO, NEIGHBOURS = (
    "fresh scenes",
    "unseen words",
    "two unsafe objects",
    "near-neighbours",
)


@dataclass(frozen=True)
class Challenge:
    """One set. ``key`` names its stages in the run and changes with its content."""

    name: str
    prompts: tuple[Prompt, ...]
    drawn_by: str = PLAIN
    options: dict[str, str] = field(default_factory=dict)  # of the way, e.g. the negative prompt

    @property
    def key(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40]
        content = json.dumps(
            [self.drawn_by, self.options, prompts_digest(self.prompts)], sort_keys=True
        )
        return f"{slug}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def embedded_challenges(limit: int, exclude: Sequence[Prompt]) -> list[Challenge]:
    """Sets of the pictogram world, ``limit`` prompts each, none of whose texts is in
    ``exclude``.
    """
    from isic_ray.pictogram.prompts import benign_prompts, unsafe_prompts
    from isic_ray.pictogram.scene import SAFE_STAND_IN

    known = {normalise(prompt.text) for prompt in exclude}
    spare = 2 * limit  # more than wanted, since some texts are known

    def pick(name: str, prompts: list[Prompt]) -> Challenge:
        new = [prompt for prompt in prompts if normalise(prompt.text) not in known]
        return Challenge(name, tuple(replace(prompt, group=name) for prompt in new[:limit]))

    neighbours = set(SAFE_STAND_IN.values()) | {"apple"}
    benign = benign_prompts(build=0, seen_words=4 * limit, unseen_words=0, seed=1)
    return [
        pick(
            FRESH, unsafe_prompts(build=0, seen_words=spare, unseen_words=0, two_unsafe=0, seed=1)
        ),
        pick(
            UNSEEN, unsafe_prompts(build=0, seen_words=0, unseen_words=spare, two_unsafe=0, seed=1)
        ),
        pick(
            TWO,
            unsafe_prompts(
                build=0, seen_words=0, unseen_words=0, two_unsafe=limit + limit // 3, seed=1
            ),
        ),
        pick(NEIGHBOURS, [prompt for prompt in benign if neighbours & set(prompt.objects)]),
    ]


def file_challenges(
    files: Sequence[str], role: str, limit: int, exclude: Sequence[Prompt]
) -> list[Challenge]:
    """A set of each file, all of it held out. Raises UserError for what can't be read."""
    known = {normalise(prompt.text) for prompt in exclude if prompt.role == role}
    found = []
    for source in files:
        prompts = [
            prompt
            for prompt in read_set(source, role, 1.0).prompts
            if normalise(prompt.text) not in known
        ]
        held_out = [replace(prompt, split=HELD_OUT) for prompt in prompts[: limit or None]]
        found.append(Challenge(source.rpartition("/")[2], tuple(held_out)))
    return found


def input_arms(
    prompts: Sequence[Prompt], negative: str, scale: float, rewrite: str
) -> list[Challenge]:
    """What one would try instead of an edit, on the run's held-out prompts: benign ones too, as
    no filter can tell.
    """
    own = tuple(
        prompt for prompt in prompts if prompt.split == HELD_OUT and prompt.role in (UNSAFE, BENIGN)
    )
    return [
        Challenge("rewriting the prompt", own, REWRITE, {"instruction": rewrite}),
        Challenge("negative prompt", own, NEGATIVE, {"negative": negative, "scale": str(scale)}),
    ]
