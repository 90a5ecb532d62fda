"""Answer prompts in text, greedily: how every family rewrites prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.models.decoding.blocks import blocks, left_pad
from isic_ray.models.decoding.network import Network
from isic_ray.models.decoding.sampler import BLOCK

ANSWER_LIMIT = 96  # tokens of a rewritten prompt at the most
# Steps between looks at whether all texts have ended: each look waits for the device.
_STOP_CHECK = 8


def answer_in_text(
    network: Network,
    lm_head: Callable[[Tensor], Tensor],
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    eos: int | Sequence[int] | None,
) -> list[str]:
    """Return the greedy answer to each prompt, without special tokens and outer spaces.

    ``eos`` is what ``generation_config.eos_token_id`` says: one id, several, or None for no end.
    """
    stop_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
    answers = complete_greedily(
        network, lm_head, prompts, pad_id=pad_id, stop_ids=stop_ids, limit=ANSWER_LIMIT
    )
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


@torch.inference_mode()
def complete_greedily(
    network: Network,
    lm_head: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    limit: int,
) -> list[list[int]]:
    """Return the likeliest next token, again and again, after each prompt of token ids.

    At most ``limit`` ids per prompt; the first of ``stop_ids`` ends an answer and is no part of it.
    """
    device = network.embedding.device
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    results: list[list[int]] = [[] for _ in prompts]
    for width, rows in blocks([len(prompt) for prompt in prompts], BLOCK):
        ids, pads = left_pad([prompts[i] for i in rows], width, pad_id, device)
        run = network.start(pads, width + limit)
        hidden = run.extend(F.embedding(ids, network.embedding))
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        drawn: list[Tensor] = []
        for step in range(limit):
            chosen = lm_head(hidden).argmax(-1)
            drawn.append(chosen)
            ended |= torch.isin(chosen, stops)
            if step + 1 == limit or (step % _STOP_CHECK == _STOP_CHECK - 1 and bool(ended.all())):
                break
            hidden = run.step(F.embedding(chosen, network.embedding))
        for i, row in zip(rows, torch.stack(drawn, 1).tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in stop_ids), len(row))
            results[i] = row[:end]
    return results
