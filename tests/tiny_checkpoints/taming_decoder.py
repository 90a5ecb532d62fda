"""The VQGAN decoder as its paper and configuration describe it: a plain reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)


class TamingDecoder(nn.Module):
    """Levels are numbered from the highest resolution, so the decoder walks them backwards."""

    def __init__(self, config: ChameleonVQVAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.channel_multiplier]
        top = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, top, 3, padding=1)
        self.mid = nn.ModuleDict(
            {
                "block_1": _residual(config, top, top),
                "attn_1": _attention(top),
                "block_2": _residual(config, top, top),
            }
        )
        levels, before = [], top
        for level in reversed(range(len(widths))):
            blocks = [
                _residual(config, before if n == 0 else widths[level], widths[level])
                for n in range(2)
            ]
            parts = {"block": nn.ModuleList(blocks), "attn": nn.ModuleList()}
            if level > 0:
                parts["upsample"] = nn.ModuleDict(
                    {"conv": nn.Conv2d(widths[level], widths[level], 3, padding=1)}
                )
            levels.insert(0, nn.ModuleDict(parts))
            before = widths[level]
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](self.conv_in(z))))
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


def _residual(config: ChameleonVQVAEConfig, before: int, after: int) -> nn.Module:
    return ChameleonVQVAEEncoderResnetBlock(config, in_channels=before, out_channels=after)


def _attention(width: int) -> nn.Module:
    return ChameleonVQVAEEncoderAttnBlock(width)
