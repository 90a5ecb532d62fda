"""The picture decoder of taming-transformers' VQGAN (Chameleon, VILA-U), which transformers has
as Janus's.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from isic_ray.errors import UserError


def build_decoder(config: Any, published: dict[str, Tensor]) -> nn.Module:
    """transformers' Janus decoder with a VQGAN's tensors ``decoder.*``. Raises UserError when they
    do not fit.

    ``config`` has the fields of transformers' `ChameleonVQVAEConfig`.
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
    # The published file counts levels from the highest resolution, transformers from the lowest.
    renamed = {
        re.sub(
            r"^up\.(\d+)",
            lambda level: f"up.{levels - 1 - int(level[1])}",
            name.removeprefix("decoder."),
        ): tensor
        for name, tensor in published.items()
    }
    try:
        decoder.load_state_dict(renamed)
    except RuntimeError as error:
        problem = " ".join(str(error).split("\n")[1:2]).strip()
        raise UserError(f"the picture decoder does not fit vq_config: {problem}") from error
    module: nn.Module = decoder
    return module
