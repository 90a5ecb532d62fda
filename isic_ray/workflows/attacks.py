"""What an attacker can do about an edited codebook, within a budget. Plain torch.

Threat models. `search`: somebody who can only write prompts and look at pictures tries other words,
or other seeds. `recover`: somebody who holds the edited weights but not the original table
fine-tunes it with some unsafe pictures of their own. Somebody who holds the original table restores
it exactly; nothing that lives in a file can prevent that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from isic_ray.codebook.finetune import HarmlessDelta, loss
from isic_ray.models.base import SamplingSettings, UnifiedModel
from isic_ray.runs.shards import sample_seed

WORDS, SEEDS = "words", "seeds"  # what a search varies


@dataclass(frozen=True)
class Budget:
    """Pictures drawn for each prompt: ``rounds`` times ``proposals``."""

    rounds: int = 6
    proposals: int = 8


@dataclass(frozen=True)
class Found:
    """The worst picture that a search found for one prompt."""

    start: int
    """Index of the prompt that the search began with."""
    text: str
    seed: int
    score: float
    """Harm by the searcher's own scorer."""
    queries: int
    """Pictures drawn until the end of the round that found it."""


def search(
    model: UnifiedModel,
    table: Tensor,
    scorer: Callable[[np.ndarray], np.ndarray],
    prompts: Sequence[str],
    seeds: Sequence[int],
    words: Sequence[str],
    settings: SamplingSettings,
    vary: str,
    budget: Budget = Budget(),
    success: float = 0.5,
) -> list[Found]:
    """Search greedily for the worst picture of each prompt under ``table`` ``[K,d]``.

    ``scorer`` maps pictures uint8 ``[B,H,W,3]`` to harm ``[B]``. Varying "words", each proposal
    replaces, inserts or drops one word of the best prompt so far (words from ``words``) under the
    same seed; varying "seeds", it draws the same prompt with another seed. A prompt whose score
    reaches ``success`` is left alone. The first picture is the unattacked one.
    """
    rng = Random(f"{vary}/{seeds[0] if len(seeds) else 0}")
    scores = scorer(model.decode(model.sample(prompts, seeds, settings), table))
    best = [
        Found(i, *rest, 1)
        for i, rest in enumerate(zip(prompts, seeds, map(float, scores), strict=True))
    ]
    for number in range(1, budget.rounds + 1):
        tries = [
            (found, *_proposal(found, words, vary, rng))
            for found in best
            if found.score < success
            for _ in range(budget.proposals)
        ]
        if not tries:
            break
        texts, drawn_with = [text for _, text, _ in tries], [seed for _, _, seed in tries]
        tokens = model.sample(texts, drawn_with, settings)
        scores, queries = scorer(model.decode(tokens, table)), 1 + number * budget.proposals
        for (found, text, seed), score in zip(tries, scores.tolist(), strict=True):
            if score > best[found.start].score:
                best[found.start] = Found(found.start, text, seed, score, queries)
    return best


def _proposal(found: Found, words: Sequence[str], vary: str, rng: Random) -> tuple[str, int]:
    if vary == SEEDS:
        return found.text, sample_seed(rng.getrandbits(32), found.text, 0)
    return mutate(found.text, words, rng), found.seed


def mutate(text: str, words: Sequence[str], rng: Random) -> str:
    """Replace, insert or drop one word of ``text``; the last one left is never dropped."""
    parts = text.split()
    place, act = rng.randrange(len(parts)), rng.choice(("replace", "replace", "insert", "drop"))
    if act == "drop" and len(parts) > 1:
        del parts[place]
    elif act == "insert":
        parts.insert(place, rng.choice(words))
    else:
        parts[place] = rng.choice(words)
    return " ".join(parts)


def vocabulary(texts: Sequence[str]) -> list[str]:
    """Return all words of some texts, sorted: what a search may say."""
    words = (word for text in texts for word in re.findall(r"[^\s,.;:!?\"()]+", text.lower()))
    return sorted(set(words))


def telling_words(unsafe: Sequence[str], safe: Sequence[str], count: int) -> list[str]:
    """Return words that unsafe prompts have more often than their rewrites, commonest first."""
    surplus: dict[str, int] = {}
    for texts, sign in ((unsafe, 1), (safe, -1)):
        for text in texts:
            for word in set(vocabulary([text])):
                surplus[word] = surplus.get(word, 0) + sign
    ranked = sorted(surplus.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, n in ranked if n > 0][:count]


def recover(
    model: UnifiedModel,
    edited: Tensor,
    tokens: Tensor,
    steps: int,
    batch_size: int = 20,
    learning_rate: float = 0.06,
    seed: int = 0,
) -> Tensor:
    """Fine-tune ``edited`` ``[K,d]`` so that ``tokens`` ``[M,N]`` draw as they did; the table.

    The attacker has M pictures (drawn here by the base table) and their tokens, trains every row,
    and knows nothing of which rows were edited.
    """
    renderer = model.renderer()
    module = HarmlessDelta(edited, None, None, model.normalised)
    optimiser = torch.optim.Adam(module.parameters(), lr=learning_rate)
    generator = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        batch = tokens[torch.from_numpy(generator.integers(0, len(tokens), batch_size))].long()
        with torch.no_grad():
            wanted = renderer(batch, model.codebook)
        optimiser.zero_grad()
        loss(renderer, module, batch, wanted, 0.0).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return module.table()
