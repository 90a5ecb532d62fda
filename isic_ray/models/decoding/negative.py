"""Draw away from a negative prompt, after Safe Latent Diffusion (Schramowski et al. 2023).

A baseline. At every step it mixes the logits of three prompts: c of the prompt itself, u without
condition, n of the negative prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.errors import UserError
from isic_ray.models.base import SamplingSettings, UnifiedModel
from isic_ray.models.decoding.blocks import blocks, left_pad
from isic_ray.models.decoding.choice import choose, row_uniforms
from isic_ray.models.decoding.sampler import BLOCK


def steer(
    conditional: Tensor, unconditional: Tensor, negative: Tensor, guidance: float, scale: float
) -> Tensor:
    """Return u + g ((c - u) - s max(n - u, 0)) ``[B,K]`` for guidance g and scale s.

    Tokens that the negative prompt makes likelier are pushed down. SLD's threshold is read as the
    maximum with 0: what the negative prompt does not favour is left alone.
    """
    away = (negative - unconditional).clamp(min=0)
    return unconditional + guidance * ((conditional - unconditional) - scale * away)


@torch.inference_mode()
def sample_away(
    model: UnifiedModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    negative: str,
    scale: float,
) -> Tensor:
    """Return visual tokens int32 ``[B,N]`` of prompts drawn away from ``negative``.

    Each row uses its own uniforms. With ``scale`` 0 and guidance on, these are the tokens of
    `UnifiedModel.sample`, but for last bits. Raises UserError for families other than Janus, and
    where guidance ends before the picture does.
    """
    from isic_ray.models.families.janus import JanusModel

    if not isinstance(model, JanusModel):
        raise UserError(
            f"negative prompts are not supported for the family {model.family}; leave that arm out"
        )
    if settings.guidance_until < 1:
        raise UserError(
            "negative prompts need guidance for every token; leave that arm out, "
            "or set guidance_until: 1"
        )
    sampler = model.sampler
    given = [model.drawing_ids(prompt) for prompt in prompts]
    away = model.drawing_ids(negative)
    free = [sampler.without_condition(prompt) for prompt in given]
    result = torch.empty(len(prompts), sampler.tokens, dtype=torch.int32)
    device = sampler.table.device
    for width, rows in blocks([max(len(ids), len(away)) for ids in given], BLOCK):
        uniforms = row_uniforms([seeds[i] for i in rows], sampler.tokens).to(device)
        texts = [*(given[i] for i in rows), *(free[i] for i in rows), *([away] * len(rows))]
        ids, pads = left_pad(texts, width, sampler.pad_id, device)
        run = sampler.backbone.start(pads, width + sampler.tokens)
        hidden = run.extend(F.embedding(ids, sampler.backbone.embedding))
        for step in range(sampler.tokens):
            conditional, unconditional, other = sampler.head(sampler.features(hidden)).chunk(3)
            scores = steer(conditional, unconditional, other, settings.guidance, scale)
            chosen = choose(scores, uniforms[:, step : step + 1], settings)
            result[torch.tensor(rows), step] = chosen.to("cpu", torch.int32)
            if step + 1 < sampler.tokens:
                hidden = run.step(F.embedding(chosen, sampler.table).repeat(3, 1))
    return result
