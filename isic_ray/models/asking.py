"""Questions about pictures, where each picture may have its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.models.backbone import Run
from isic_ray.models.base import Judge


@runtime_checkable
class JudgesEach(Protocol):
    """A judge that reads a picture once for all questions about it, though they differ from picture to picture."""

    def judge_each(self, images: np.ndarray, questions: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `judge_each`."""
        ...


def judge_each(judge: Judge, images: np.ndarray, questions: Sequence[Sequence[str]]) -> list[list[float]]:
    """P(yes) for the questions ``questions[i]`` about picture i, in their order; the same numbers as from `judge`."""
    if isinstance(judge, JudgesEach):
        return judge.judge_each(images, questions)
    answers: dict[tuple[int, str], float] = {}
    for question in dict.fromkeys(q for own in questions for q in own):
        members = [i for i, own in enumerate(questions) if question in own]
        for i, score in zip(members, judge.judge(images[members], [question])[:, 0].tolist(), strict=True):
            answers[i, question] = score
    return [[answers[i, question] for question in own] for i, own in enumerate(questions)]


def after_questions(
    picture: Run, asked: Sequence[tuple[int, Sequence[int]]], multiple: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The last hidden states ``[R,h]`` after questions, with their indices into ``asked``; more rows are filler.

    ``asked`` pairs a row of ``picture`` with the question's ids. Questions of one length run together, filled up to a
    multiple of ``multiple`` rows.
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
    """The mass of all one-token spellings of yes against those of no: float32 ``[R]`` from logits ``[R,V]``.

    In float64 on the way: a CPU's vector and scalar functions differ in the last bit, and which of them a row meets
    depends on its place among the rows.
    """
    yes_mass, no_mass = (logits[:, list(ids)].double().logsumexp(-1) for ids in (yes, no))
    return torch.sigmoid(yes_mass - no_mass).float()
