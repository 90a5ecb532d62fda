"""Sample red-team and benign prompts from the pictogram world's grammar.

The same arguments give the same prompts. Build prompts come from scenes that training may show;
held-out prompts from scenes that training never drew, in groups that say what else is new about
them.
"""

from __future__ import annotations

from random import Random

from isic_ray.pictogram.scene import Scene, caption, sample_scene, sample_wording
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Prompt, prompt_id

SEEN_WORDS = "seen words"  # a new scene in words that build prompts use too
# A new scene in nouns, openings and joiners that no build prompt uses.
UNSEEN_WORDS = "unseen words"
TWO_UNSAFE = "two unsafe objects"  # a composition that no build prompt has
_TRIES = 2_000  # draws in a row without a new text, after which a set counts as exhausted


def unsafe_prompts(
    build: int = 400,
    seen_words: int = 150,
    unseen_words: int = 100,
    two_unsafe: int = 50,
    seed: int = 0,
) -> list[Prompt]:
    """Return prompts that ask for a weapon or gore: build ones, then the held-out groups, mixed.

    The arguments are the numbers of prompts of each group. Raises ValueError when the grammar has
    fewer different texts.
    """
    sampler = _Sampler(UNSAFE, seed)
    held_out = [
        *sampler.draw(seen_words, HELD_OUT, SEEN_WORDS),
        *sampler.draw(unseen_words, HELD_OUT, UNSEEN_WORDS),
        *sampler.draw(two_unsafe, HELD_OUT, TWO_UNSAFE),
    ]
    return sampler.draw(build, BUILD) + sampler.mixed(held_out)


def benign_prompts(
    build: int = 400, seen_words: int = 200, unseen_words: int = 100, seed: int = 0
) -> list[Prompt]:
    """Return prompts without any unsafe object: build ones, then the held-out groups, mixed.

    The arguments are the numbers of prompts of each group. Raises ValueError when the grammar has
    fewer different texts.
    """
    sampler = _Sampler(BENIGN, seed)
    held_out = [
        *sampler.draw(seen_words, HELD_OUT, SEEN_WORDS),
        *sampler.draw(unseen_words, HELD_OUT, UNSEEN_WORDS),
    ]
    return sampler.draw(build, BUILD) + sampler.mixed(held_out)


class _Sampler:
    """Samples prompts of one role, never the same text twice.

    Every group has its own random stream.
    """

    def __init__(self, role: str, seed: int) -> None:
        self.role, self.seed = role, seed
        self._texts: set[str] = set()

    def draw(self, count: int, split: str, group: str = "") -> list[Prompt]:
        rng = Random(f"{self.seed}/{self.role}/{split}/{group}")
        unsafe = None if group == TWO_UNSAFE else self.role == UNSAFE
        prompts: list[Prompt] = []
        failures = 0
        while len(prompts) < count:
            scene = sample_scene(rng, unsafe=unsafe)
            text = caption(scene, sample_wording(rng, scene, held_out=group == UNSEEN_WORDS))
            if scene.is_held_out == (split == HELD_OUT) and text not in self._texts:
                self._texts.add(text)
                prompts.append(self._prompt(scene, text, split, group))
                failures = 0
            elif (failures := failures + 1) > _TRIES:
                raise ValueError(
                    f"the pictogram world has no {count} {self.role} {split} prompts of group "
                    f"{group!r}"
                )
        return prompts

    def mixed(self, prompts: list[Prompt]) -> list[Prompt]:
        """Return the prompts in a random order, so that the first N of them hold all groups."""
        return Random(f"{self.seed}/{self.role}/order").sample(prompts, len(prompts))

    def _prompt(self, scene: Scene, text: str, split: str, group: str) -> Prompt:
        objects = tuple(thing.kind for thing in scene.things)
        concepts = tuple(sorted(scene.concepts))
        return Prompt(prompt_id(self.role, text), text, self.role, split, concepts, objects, group)
