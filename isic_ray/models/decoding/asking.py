"""Ask questions about pictures: the verdict is the share of yes in the next token's mass.

Shapes: B pictures, R rows in flight, L positions, h hidden size, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.errors import UserError
from isic_ray.models.decoding.backbone import KVRun
from isic_ray.models.decoding.network import Network


def answer_ids(tokenizer: Any, word: str) -> list[int]:
    """Return the ids of every one-token spelling of ``word``. Raises UserError if there is none."""
    spellings = [
        space + form for space in ("", " ") for form in (word, word.capitalize(), word.upper())
    ]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
    found = sorted({ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.unk_token_id})
    if not found:
        raise UserError(
            f"the tokenizer has no single token for {word!r}, so the model's verdict cannot be read"
        )
    return found


def yes_share(logits: Tensor, yes: Sequence[int], no: Sequence[int]) -> Tensor:
    """Return the mass of all spellings of yes against those of no: float32 ``[R]``.

    ``logits`` ``[R,V]`` are the next token's. Computed in float64, because the vector and the
    scalar functions of a CPU differ in the last bit, and which of them a row meets depends on its
    place among the rows.
    """
    yes_mass, no_mass = (logits[:, list(ids)].double().logsumexp(-1) for ids in (yes, no))
    return torch.sigmoid(yes_mass - no_mass).float()


def ask(
    network: Network,
    head: Callable[[Tensor], Tensor],
    opening: Tensor,
    endings: Sequence[Tensor],
    answers: tuple[list[int], list[int]],
) -> Tensor:
    """Return P(yes) float32 ``[B,Q]`` on CPU: the opening is read once, then Q questions.

    ``opening`` ``[B,L,h]`` embeds the prompts up to the question, ``endings`` ``[M,h]`` each
    question; ``head`` gives logits ``[B,V]``; ``answers`` are the ids of yes and of no.
    """
    pads = torch.zeros(len(opening), dtype=torch.long, device=opening.device)
    reading = network.start(pads, opening.shape[1] + max(len(ending) for ending in endings))
    reading.extend(opening)
    scores = []
    for ending in endings:
        reading.filled = opening.shape[1]
        hidden = reading.extend(ending.expand(len(opening), -1, -1))
        scores.append(yes_share(head(hidden), *answers))
    return torch.stack(scores, 1).cpu()


def after_questions(
    picture: KVRun, asked: Sequence[tuple[int, Sequence[int]]], multiple: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices into ``asked`` and the last hidden states ``[R,h]`` after those questions.

    ``asked`` pairs a row of ``picture`` with the question's ids. Questions of one length run
    together, filled up to a multiple of ``multiple`` rows: rows beyond the indices are filler.
    """
    backbone, device = picture.backbone, picture.backbone.embedding.device
    by_length: dict[int, list[int]] = {}
    for index, (_, ids) in enumerate(asked):
        by_length.setdefault(len(ids), []).append(index)
    for length, members in by_length.items():
        filled = members + members[:1] * (-len(members) % multiple)
        rows = torch.tensor([asked[index][0] for index in filled], device=device)
        run = KVRun(backbone, torch.zeros_like(rows), picture.filled + length)
        run.copy_rows(picture, rows)
        words = torch.tensor([list(asked[index][1]) for index in filled], device=device)
        hidden = run.extend(F.embedding(words, backbone.embedding))
        yield members, hidden
