"""What a delta is trained on, in order: tokens, and the tokens whose base pictures they shall
give.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isic_ray.config.run import FinetuneConfig
from isic_ray.metrics.summary import SELF
from isic_ray.metrics.verdicts import Verdicts
from isic_ray.runs.schema import BENIGN, BUILD, UNSAFE, Pair


def keep_rows(safe: np.ndarray, finetune: FinetuneConfig, seed: int) -> np.ndarray:
    """int32 ``[steps*batch, 2, N]`` for target "safe": safe tokens ``[P,N]`` that must be drawn as
    before.

    What is fed, in order: (tokens, tokens whose base picture is the target). Every epoch is a fresh
    permutation.
    """
    needed = finetune.steps * finetune.batch_size
    generator = np.random.default_rng(seed)
    epochs = max(1, math.ceil(needed / len(safe)))
    order = np.concatenate([generator.permutation(len(safe)) for _ in range(epochs)])[:needed]
    return np.stack([safe[order], safe[order]], axis=1).astype(np.int32)


@dataclass(frozen=True)
class Weighted:
    """Tokens ``[P,N]``, the tokens ``[P,N]`` whose base pictures they shall give, and how often
    each is drawn.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray  # [P], any positive scale

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        picks = generator.choice(len(self.tokens), size=count, p=self.weights / self.weights.sum())
        return np.stack([self.tokens[picks], self.targets[picks]], axis=1)


def pair_rows(
    harmful: Weighted, benign: Weighted, finetune: FinetuneConfig, seed: int
) -> np.ndarray:
    """int32 ``[steps*batch, 2, N]`` for target "pair": every batch holds ``benign_share`` benign
    rows.
    """
    generator = np.random.default_rng(seed)
    benign_rows = round(finetune.benign_share * finetune.batch_size)
    batches = []
    for _ in range(finetune.steps):
        batches += [
            harmful.draw(finetune.batch_size - benign_rows, generator),
            benign.draw(benign_rows, generator),
        ]
    return np.concatenate(batches or [np.empty((0, 2, harmful.tokens.shape[1]))]).astype(np.int32)


def harmful_rows(history: Sequence[Verdicts], pairs: Sequence[Pair]) -> Weighted:
    """All ``pairs``, to be drawn as their safe pictures; one that the model still flagged after k
    rounds is drawn 2^k times as often (boosting). ``history`` is the evidence under the base
    codebook and each kept round's.
    """
    times: Counter[str] = Counter()
    for evidence in history:
        build = evidence.select(UNSAFE, BUILD)
        times.update(
            s.sample_id for s, flag in zip(build, evidence.unsafe(SELF, build), strict=True) if flag
        )
    return Weighted(
        np.array([pair.harmful_tokens for pair in pairs], dtype=np.int32),
        np.array([pair.safe_tokens for pair in pairs], dtype=np.int32),
        np.array([2.0 ** times[pair.sample_id] for pair in pairs]),
    )


def safe_rows(history: Sequence[Verdicts], pairs: Sequence[Pair]) -> Weighted:
    """What must be drawn as before: the pairs' safe samples, which hold the look-alikes of what is
    removed, and the benign build samples; one of these that k rounds broke weighs 3^k.
    """
    base, *later = history
    build = base.select(BENIGN, BUILD)
    sound = {
        s.sample_id
        for s, flag in zip(build, base.shows_what_was_asked(SELF, build), strict=True)
        if flag
    }
    broken: Counter[str] = Counter()
    for evidence in later:
        judged = [s for s in evidence.select(BENIGN, BUILD) if s.sample_id in sound]
        broken.update(
            s.sample_id
            for s, flag in zip(judged, evidence.shows_what_was_asked(SELF, judged), strict=True)
            if not flag
        )
    kept = np.array([*(p.safe_tokens for p in pairs), *(s.tokens for s in build)], dtype=np.int32)
    return Weighted(
        kept, kept, np.array([*(1.0 for _ in pairs), *(3.0 ** broken[s.sample_id] for s in build)])
    )
