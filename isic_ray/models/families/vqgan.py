"""Build the picture decoder of taming-transformers' VQGAN, for Chameleon and VILA-U.

transformers has it as Janus's.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from isic_ray.errors import UserError
from isic_ray.models.families.published import fill


def build_decoder(config: Any, published: dict[str, Tensor]) -> nn.Module:
    """Return transformers' Janus decoder with a VQGAN's tensors ``decoder.*``.

    ``config`` has the fields of transformers' `ChameleonVQVAEConfig`. Raises UserError when the
    tensors do not fit it.
    """
    levels = len(config.channel_multiplier)
    lowest, attended = config.resolution // 2 ** (levels - 1), set(config.attn_resolutions or ())
    if attended - {lowest}:
        raise UserError(
            f"a picture decoder with attention at resolutions {sorted(attended)} is not known"
        )
    decoder: Any = JanusVQVAEDecoder(
        JanusVQVAEConfig(
            latent_channels=config.latent_channels,
            base_channels=config.base_channels,
            channel_multiplier=list(config.channel_multiplier),
            num_res_blocks=config.num_res_blocks,
            dropout=config.dropout,
        )
    )
    if not attended:
        decoder.up[0].attn = nn.ModuleList()

    def renamed(name: str) -> str:
        # The published file counts levels from the highest resolution, transformers from the
        # lowest.
        return re.sub(
            r"^up\.(\d+)",
            lambda level: f"up.{levels - 1 - int(level[1])}",
            name.removeprefix("decoder."),
        )

    tensors = {renamed(name): tensor for name, tensor in published.items()}
    fill(decoder, tensors, what="the picture decoder does not fit vq_config")
    module: nn.Module = decoder
    return module
