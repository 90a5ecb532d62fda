"""Questions about pictures: hidden states after them, and how much of the next token's mass says
yes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.models.decoding.backbone import Run


def after_questions(
    picture: Run, asked: Sequence[tuple[int, Sequence[int]]], multiple: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The last hidden states ``[R,h]`` after questions, with their indices into ``asked``; more
    rows are filler.

    ``asked`` pairs a row of ``picture`` with the question's ids. Questions of one length run
    together, filled up to a multiple of ``multiple`` rows.
    """
    backbone, device = picture.backbone, picture.backbone.embedding.device
    by_length: dict[int, list[int]] = {}
    for index, (_, ids) in enumerate(asked):
        by_length.setdefault(len(ids), []).append(index)
    for length, members in by_length.items():
        filled = members + members[:1] * (-len(members) % multiple)
        rows = torch.tensor([asked[index][0] for index in filled], device=device)
        run = Run(backbone, torch.zeros_like(rows), picture.filled + length)
        run.copy_rows(picture, rows)
        words = torch.tensor([list(asked[index][1]) for index in filled], device=device)
        hidden = run.extend(F.embedding(words, backbone.embedding))
        yield members, hidden


def yes_share(logits: Tensor, yes: Sequence[int], no: Sequence[int]) -> Tensor:
    """The mass of all one-token spellings of yes against those of no: float32 ``[R]`` from logits
    ``[R,V]``.

    In float64 on the way: a CPU's vector and scalar functions differ in the last bit, and which of
    them a row meets depends on its place among the rows.
    """
    yes_mass, no_mass = (logits[:, list(ids)].double().logsumexp(-1) for ids in (yes, no))
    return torch.sigmoid(yes_mass - no_mass).float()
