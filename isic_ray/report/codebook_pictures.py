"""What a run's edit did to the codebook: as text, and as pictures of codes, none harmful."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isic_ray.codebook.explain import touched
from isic_ray.metrics.results import RunResults
from isic_ray.models.base import UnifiedModel
from isic_ray.models.registry import read_spec
from isic_ray.report.evidence import explanation_table
from isic_ray.report.html import Picture
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Sample

_CODES = 16  # codes in a strip
_CELL = 16  # pixels of one cell of a heat map
_DARK = np.array([11, 72, 112], dtype=np.float32)  # colour of a place where every token changed


def explain_run(uri: str) -> str:
    """Return what the edit of the finished run at ``uri`` changed, as plain text.

    Raises UserError for a run that has not ended, or whose results are of another version.
    """
    results = RunResults.open(uri)
    spec = read_spec(results.config.model)
    return explanation_table(results.explanation(spec.codebook, spec.normalised).facts)


def explanation_pictures(results: RunResults, model: UnifiedModel) -> list[tuple[str, Picture]]:
    """Return (caption, picture): strips of changed codes, and heat maps of changed tokens.

    The strips show the most used changed codes, and the codes along each harmful direction. A code
    is shown by the middle of a picture that repeats it: its colour and texture, never a whole
    object.
    """
    found = results.explanation(model.codebook, model.normalised)
    table = results.table(results.best, model.codebook)
    shown = []
    if len(found.changed):
        strip = _strip(model, found.changed[:_CODES], table)
        shown.append(("Most used changed codes, before (top) and after", strip))
    for number, codes in enumerate(found.nearest, 1):
        text = f"Codes furthest along harmful direction {number}, before (top) and after"
        shown.append((text, _strip(model, codes, table)))
    held_out = [sample for sample in results.samples if sample.split == HELD_OUT]
    unsafe, benign = (
        _heat([sample for sample in held_out if sample.role == role], model.codebook, table)
        for role in (UNSAFE, BENIGN)
    )
    if unsafe is not None and benign is not None:
        gap = np.full((unsafe.shape[0], _CELL, 3), 255, dtype=np.uint8)
        text = (
            "Share of changed tokens by place, white 0% to dark 100%: "
            "unsafe prompts (left), benign (right)"
        )
        shown.append((text, np.concatenate([unsafe, gap, benign], axis=1)))
    return shown


def _strip(model: UnifiedModel, codes: Tensor, table: Tensor) -> Picture:
    """Return codes int64 ``[C]`` side by side, under the base table and below under ``table``."""
    tokens = codes[:, None].expand(-1, model.tokens_per_image)
    rows = [
        np.concatenate(list(_middle(model.decode(tokens, book))), axis=1) for book in (None, table)
    ]
    return np.concatenate(rows, axis=0)


def _middle(pictures: np.ndarray) -> np.ndarray:
    """Return the middle third ``[B,H/3,W/3,3]``, away from what the decoder does at borders."""
    height, width = pictures.shape[1:3]
    return pictures[:, height // 3 : 2 * height // 3, width // 3 : 2 * width // 3]


def _heat(samples: Sequence[Sample], base: Tensor, edited: Tensor) -> Picture | None:
    """Return the share of changed tokens by place, as uint8 ``[H,W,3]``.

    None where there is no sample, or tokens form no square.
    """
    if not samples:
        return None
    tokens = torch.tensor([sample.tokens for sample in samples])
    share = touched(tokens, base, edited).float().mean(0)
    side = math.isqrt(len(share))
    if side * side != len(share):
        return None
    cells = share.view(side, side, 1).repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1)
    return np.asarray((255 - cells.numpy() * (255 - _DARK)).round(), dtype=np.uint8)
