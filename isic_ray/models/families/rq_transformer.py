"""Draw the tokens of one position after one another: RQ-Transformer (Lee et al. 2022), for VILA-U.

Shapes: R rows, e its width, h the LLaMA's hidden size, K codebook rows of width d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isic_ray.models.families.published import fill, inside


class DepthTransformer(nn.Module):
    """The small transformer over the tokens of one position; frozen."""

    def __init__(self, config: dict[str, Any], tower: dict[str, Tensor]) -> None:
        """Build it by the published ``rqtransformer`` config and tensors.

        Raises UserError when they do not fit.
        """
        super().__init__()
        width, heads = config["embed_dim"], config["head"]["block"]["n_head"]
        self.in_mlp_1 = nn.Linear(config["input_embed_dim_1"], width)
        self.in_mlp_2 = nn.Linear(config["input_embed_dim_2"], width)
        self.pos_emb_d = nn.Parameter(torch.zeros(1, config["block_size"][2], width))
        blocks = nn.ModuleList([_Block(width, heads) for _ in range(config["head"]["n_layer"])])
        self.head_transformer = nn.ModuleDict({"blocks": blocks})
        last = {"layer_norm": nn.LayerNorm(width), "linear": nn.Linear(width, config["vocab_size"])}
        self.classifier_mlp = nn.ModuleDict(last)
        fill(self, inside(tower, "rqtransformer."))
        self.eval().requires_grad_(False)

    def begin(self, hidden: Tensor) -> Tensor:
        """Return the context ``[R,1,e]`` that the LLaMA's state ``[R,h]`` gives."""
        context: Tensor = self.in_mlp_2(hidden)[:, None]
        return context

    def extend(self, context: Tensor, total: Tensor) -> Tensor:
        """Return the context one longer, by the sum of the rows drawn so far ``[R,d]``."""
        return torch.cat([context, self.in_mlp_1(total)[:, None]], 1)

    def forward(self, context: Tensor) -> Tensor:
        """Return logits ``[R,K]`` of the next token of the position."""
        x = context + self.pos_emb_d[:, : context.shape[1]]
        blocks: Any = self.head_transformer["blocks"]
        for block in blocks:
            x = block(x)
        logits: Tensor = self.classifier_mlp["linear"](self.classifier_mlp["layer_norm"](x[:, -1]))
        return logits


class _Block(nn.Module):
    """One layer, with the published names of its parts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        parts = ("key", "query", "value", "proj")
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in parts})
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (
            self.attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](mixed)
        return x + self.mlp(self.ln2(x))  # type: ignore[no-any-return]
