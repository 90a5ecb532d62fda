"""From a finished run to what its edit did: the facts, and pictures of codes before and after,
no harmful picture.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isic_ray.codebook import SafeCodebook
from isic_ray.codebook.explain import Explanation, explain, touched
from isic_ray.models.base import UnifiedModel
from isic_ray.report.gallery import Picture
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Pair, Sample
from isic_ray.runs.shards import PAIRS, TOKENS

_CODES = 16  # codes in a strip
_CELL = 16  # pixels of one cell of a heat map


def explain_run(run: Run, codebook: Tensor, normalised: bool) -> Explanation:
    """The explanation of a run's best edit of the base table ``[K,d]``. The run must have ended."""
    pairs = run.read(PAIRS, Pair)
    benign = [s.tokens for s in run.read(TOKENS, Sample) if s.role == BENIGN and s.split == BUILD]
    return explain(
        codebook,
        edited_table(run, codebook),
        torch.tensor([pair.harmful_tokens for pair in pairs]),
        torch.tensor([pair.safe_tokens for pair in pairs]),
        torch.tensor(benign),
        [pair.concepts for pair in pairs],
        normalised,
    )


def edited_table(run: Run, codebook: Tensor) -> Tensor:
    """The run's best table ``[K,d]``."""
    return SafeCodebook.from_bytes(run.get_blob(run.summary()["safe_codebook"])).apply_to(codebook)


def explanation_pictures(
    run: Run, model: UnifiedModel, found: Explanation
) -> list[tuple[str, Picture]]:
    """(caption, picture): the most used changed codes, codes along each harmful direction, and heat
    maps.

    A code is shown by the middle of a picture that repeats it: its colour and texture, never a
    whole object.
    """
    table = edited_table(run, model.codebook)
    shown = []
    if len(found.changed):
        shown.append(
            (
                "Most used changed codes, before (top) and after",
                _strip(model, found.changed[:_CODES], table),
            )
        )
    for number, codes in enumerate(found.nearest, 1):
        text = f"Codes furthest along harmful direction {number}, before (top) and after"
        shown.append((text, _strip(model, codes, table)))
    samples = [sample for sample in run.read(TOKENS, Sample) if sample.split == HELD_OUT]
    maps = [
        _heat([s for s in samples if s.role == role], model.codebook, table)
        for role in (UNSAFE, BENIGN)
    ]
    if all(one is not None for one in maps):
        gap = np.full((maps[0].shape[0], _CELL, 3), 255, dtype=np.uint8)
        text = "Share of changed tokens by place, white 0% to dark 100%: unsafe prompts (left), benign (right)"
        shown.append((text, np.concatenate([maps[0], gap, maps[1]], axis=1)))
    return shown


def _strip(model: UnifiedModel, codes: Tensor, table: Tensor) -> Picture:
    tokens = codes[:, None].expand(-1, model.tokens_per_image)
    rows = [
        np.concatenate(list(_middle(model.decode(tokens, book))), axis=1) for book in (None, table)
    ]
    return np.concatenate(rows, axis=0)


def _middle(pictures: np.ndarray) -> np.ndarray:
    """The middle third ``[B,H/3,W/3,3]``: away from what the decoder does at borders."""
    height, width = pictures.shape[1:3]
    return pictures[:, height // 3 : 2 * height // 3, width // 3 : 2 * width // 3]


def _heat(samples: list[Sample], base: Tensor, edited: Tensor) -> Any:
    """Mean of changed tokens by place as uint8 ``[H,W,3]``; None where tokens form no square or
    there is no sample.
    """
    if not samples:
        return None
    share = (
        touched(torch.tensor([sample.tokens for sample in samples]), base, edited).float().mean(0)
    )
    side = math.isqrt(len(share))
    if side * side != len(share):
        return None
    weight = (
        share.view(side, side, 1).repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1).numpy()
    )
    dark = np.array([11, 72, 112], dtype=np.float32)
    return np.asarray((255 - weight * (255 - dark)).round(), dtype=np.uint8)
