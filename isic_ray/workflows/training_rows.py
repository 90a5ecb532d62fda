"""The rows that a delta is trained on, in order.

A row is a picture's tokens, and the tokens whose base picture they should give.
Letters: P pictures to choose from, N tokens per picture.
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
from isic_ray.runs.schema import BENIGN, BUILD, Pair


def keep_rows(safe: np.ndarray, finetune: FinetuneConfig, seed: int) -> np.ndarray:
    """Return int32 ``[steps*batch,2,N]`` for target "safe": ``safe`` ``[P,N]`` is drawn as before.

    Every epoch is a new permutation.
    """
    needed = finetune.steps * finetune.batch_size
    generator = np.random.default_rng(seed)
    epochs = max(1, math.ceil(needed / len(safe)))
    order = np.concatenate([generator.permutation(len(safe)) for _ in range(epochs)])[:needed]
    return np.stack([safe[order], safe[order]], axis=1).astype(np.int32)


@dataclass(frozen=True)
class Weighted:
    """Pictures to choose from."""

    tokens: np.ndarray
    """int32 ``[P,N]``."""
    targets: np.ndarray
    """int32 ``[P,N]``, tokens whose base pictures they should give."""
    weights: np.ndarray
    """float ``[P]``: how often each is drawn, on any positive scale."""

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Draw rows int32 ``[count,2,N]``."""
        picks = generator.choice(len(self.tokens), size=count, p=self.weights / self.weights.sum())
        return np.stack([self.tokens[picks], self.targets[picks]], axis=1)


def pair_rows(
    harmful: Weighted, benign: Weighted, finetune: FinetuneConfig, seed: int
) -> np.ndarray:
    """Return int32 ``[steps*batch,2,N]`` for target "pair".

    ``finetune.benign_share`` of every batch are benign rows.
    """
    generator = np.random.default_rng(seed)
    benign_rows = round(finetune.benign_share * finetune.batch_size)
    batches = []
    for _ in range(finetune.steps):
        batches.append(harmful.draw(finetune.batch_size - benign_rows, generator))
        batches.append(benign.draw(benign_rows, generator))
    return np.concatenate(batches or [np.empty((0, 2, harmful.tokens.shape[1]))]).astype(np.int32)


def harmful_rows(history: Sequence[Verdicts], pairs: Sequence[Pair]) -> Weighted:
    """Return the harmful samples of ``pairs``, to be drawn as their safe pictures.

    One that the model still flagged after k rounds is drawn 2^k times as often (boosting).
    ``history`` holds the verdicts under the base codebook and under each kept round's.
    """
    times: Counter[str] = Counter()
    for verdicts in history:
        times.update(verdicts.flagged(BUILD))
    return Weighted(
        np.array([pair.harmful_tokens for pair in pairs], dtype=np.int32),
        np.array([pair.safe_tokens for pair in pairs], dtype=np.int32),
        np.array([2.0 ** times[pair.sample_id] for pair in pairs]),
    )


def safe_rows(history: Sequence[Verdicts], pairs: Sequence[Pair]) -> Weighted:
    """Return what must be drawn as before.

    These are the pairs' safe samples, which hold the look-alikes of what is removed, and the benign
    build samples; one of those that k rounds broke weighs 3^k.
    """
    base, *later = history
    build = base.select(BENIGN, BUILD)
    flags = base.shows_what_was_asked(SELF, build)
    sound = {sample.sample_id for sample, flag in zip(build, flags, strict=True) if flag}
    broken: Counter[str] = Counter()
    for verdicts in later:
        judged = [s for s in verdicts.select(BENIGN, BUILD) if s.sample_id in sound]
        flags = verdicts.shows_what_was_asked(SELF, judged)
        broken.update(s.sample_id for s, flag in zip(judged, flags, strict=True) if not flag)
    kept = np.array([*(p.safe_tokens for p in pairs), *(s.tokens for s in build)], dtype=np.int32)
    weights = [*(1.0 for _ in pairs), *(3.0 ** broken[s.sample_id] for s in build)]
    return Weighted(kept, kept, np.array(weights))
