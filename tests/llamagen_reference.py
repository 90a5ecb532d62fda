"""Write LlamaGen plainly from its publication, on tensors by their published names: a reference.

No cache, one full forward per token, complex rotary numbers over neighbouring pairs, attention in
plain products. Shapes: B pictures, N tokens each, K of a codebook, P positions of a prompt, T of a
sequence, H heads of width D, h hidden size, c the text encoder's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def angles(side: int, head_dim: int) -> Tensor:
    """Return complex ``[N,head_dim/2]``: half of the pairs turn with the row, half with the column.

    The row's half comes first.
    """
    quarter = head_dim // 4
    speeds = 10000.0 ** (-torch.arange(quarter).float() * 2 / (head_dim // 2))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    phase = torch.cat([rows.flatten()[:, None] * speeds, columns.flatten()[:, None] * speeds], 1)
    return torch.polar(torch.ones_like(phase), phase)


def transformer(
    weights: Weights, embedded: Tensor, hidden_slots: int, prefix: int, side: int, heads: int
) -> Tensor:
    """Return logits ``[K]`` after ``[T,h]``.

    The first ``hidden_slots`` see only themselves, and no other sees them.
    """
    length, width = embedded.shape
    head_dim = width // heads
    unturned = torch.zeros(prefix, head_dim // 2, dtype=torch.complex64)
    turn = torch.cat([unturned, angles(side, head_dim)])[:length]
    order = torch.arange(length)
    seen = (order[:, None] >= order) & (order >= hidden_slots) | torch.eye(length, dtype=torch.bool)

    def rotate(x: Tensor) -> Tensor:  # [T,H,D]
        pairs = torch.view_as_complex(x.reshape(length, heads, -1, 2).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights[f"{name}.weight"]

    x, layer = embedded, 0
    while f"layers.{layer}.attention.wqkv.weight" in weights:
        at = f"layers.{layer}"
        y = norm(x, f"{at}.attention_norm")
        q, k, v = (y @ weights[f"{at}.attention.wqkv.weight"].T).chunk(3, -1)
        q, k, v = rotate(q), rotate(k), v.view(length, heads, head_dim)
        scores = torch.einsum("qhd,khd->hqk", q, k) / head_dim**0.5
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", shares, v).flatten(1)
        x = x + mixed @ weights[f"{at}.attention.wo.weight"].T
        y = norm(x, f"{at}.ffn_norm")
        gate, up = (y @ weights[f"{at}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ weights[f"{at}.feed_forward.w2.weight"].T
        layer += 1
    return norm(x[-1], "norm") @ weights["output.weight"].T


def project(weights: Weights, states: Tensor) -> Tensor:
    """Embed a caption: two linear maps with a tanh-approximated GELU between."""
    first, second = (weights[f"cls_embedding.cap_proj.{name}.weight"] for name in ("fc1", "fc2"))
    return F.gelu(states @ first.T, approximate="tanh") @ second.T


def draw_greedily(
    weights: Weights, states: Tensor, mask: Tensor, side: int, heads: int, guidance: float
) -> list[int]:
    """Return the tokens of one prompt from text states ``[P,c]`` and their mask ``[P]``.

    The words are moved to the end of the prefix.
    """
    prefix, words = len(mask), int(mask.sum())
    moved = torch.cat([states[words:], states[:words]]) * mask.flip(0)[:, None]
    openings = [
        project(weights, moved),
        project(weights, weights["cls_embedding.uncond_embedding"]),
    ]
    drawn: list[int] = []
    for _ in range(side**2):
        tail = weights["tok_embeddings.weight"][torch.tensor(drawn, dtype=torch.long)]
        given, free = (
            transformer(weights, torch.cat([opening, tail]), prefix - words, prefix, side, heads)
            for opening in openings
        )
        drawn.append(int((free + guidance * (given - free)).argmax()))
    return drawn


def _conv(weights: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    kernel = weights[f"{name}.weight"]
    padding = kernel.shape[-1] // 2 if stride == 1 else 0
    return F.conv2d(x, kernel, weights[f"{name}.bias"], stride=stride, padding=padding)


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def _residual(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = _conv(weights, f"{name}.conv1", F.silu(_norm(weights, f"{name}.norm1", x)))
    y = _conv(weights, f"{name}.conv2", F.silu(_norm(weights, f"{name}.norm2", y)))
    if f"{name}.nin_shortcut.weight" in weights:
        x = _conv(weights, f"{name}.nin_shortcut", x)
    return y + x


def _attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = _norm(weights, f"{name}.norm", x)
    q, k, v = (_conv(weights, f"{name}.{part}", y).flatten(2).mT[:, None] for part in "qkv")
    mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.view_as(x)
    return x + _conv(weights, f"{name}.proj_out", mixed)


def _middle(weights: Weights, side: str, x: Tensor) -> Tensor:
    x = _attention(weights, f"{side}.mid.1", _residual(weights, f"{side}.mid.0", x))
    return _residual(weights, f"{side}.mid.2", x)


def _level(weights: Weights, name: str, x: Tensor) -> Tensor:
    block = 0
    while f"{name}.res.{block}.conv1.weight" in weights:
        x = _residual(weights, f"{name}.res.{block}", x)
        if f"{name}.attn.{block}.q.weight" in weights:
            x = _attention(weights, f"{name}.attn.{block}", x)
        block += 1
    return x


def decode(weights: Weights, tokens: Tensor, table: Tensor, side: int) -> Tensor:
    """Return pixels ``[B,3,height,width]`` of tokens ``[B,N]``."""
    rows = F.normalize(table, dim=-1)[tokens.long()]
    rows = rows.view(len(tokens), side, side, -1).permute(0, 3, 1, 2)
    x = _conv(weights, "decoder.conv_in", _conv(weights, "post_quant_conv", rows))
    x, level = _middle(weights, "decoder", x), 0
    while f"decoder.conv_blocks.{level}.res.0.conv1.weight" in weights:
        x = _level(weights, f"decoder.conv_blocks.{level}", x)
        upsample = f"decoder.conv_blocks.{level}.upsample.conv"
        if f"{upsample}.weight" in weights:
            x = _conv(weights, upsample, F.interpolate(x, scale_factor=2.0))
        level += 1
    return _conv(weights, "decoder.conv_out", F.silu(_norm(weights, "decoder.norm_out", x)))


def encode(weights: Weights, pixels: Tensor) -> Tensor:
    """Return tokens ``[B,N]`` of pixels ``[B,3,height,width]``: the nearest rows, normalised."""
    x, level = _conv(weights, "encoder.conv_in", pixels), 0
    while f"encoder.conv_blocks.{level}.res.0.conv1.weight" in weights:
        x = _level(weights, f"encoder.conv_blocks.{level}", x)
        downsample = f"encoder.conv_blocks.{level}.downsample.conv"
        if f"{downsample}.weight" in weights:
            x = _conv(weights, downsample, F.pad(x, (0, 1, 0, 1)), stride=2)
        level += 1
    x = F.silu(_norm(weights, "encoder.norm_out", _middle(weights, "encoder", x)))
    x = _conv(weights, "encoder.conv_out", x)
    z = F.normalize(_conv(weights, "quant_conv", x), dim=1).flatten(2).mT
    table = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    return torch.cdist(z, table[None]).argmin(-1)
