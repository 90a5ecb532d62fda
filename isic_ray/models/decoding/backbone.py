"""Run rows through a LLaMA that is fused for decoding, with a static key-value cache.

Shapes: R rows, L new positions, T cache slots, h hidden size, H query heads, G key-value heads, D
head size.

Everything that changes from one step to the next (position, mask, cache) lies in tensors that are
written in place, so that a CUDA graph can capture a step and replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Projection = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer: norms, and linear maps that are fused where they can be."""

    norm_attention: Tensor
    qkv: Projection
    out: Projection
    norm_mlp: Tensor
    gate_up: Projection
    down: Projection


class Backbone:
    """A transformers `LlamaModel` fused for decoding: a `decoding.network.Network`.

    On a GPU the module shares the fused weights. On a CPU they are packed for oneDNN, a second copy
    in memory.
    """

    def __init__(self, llama: Any) -> None:
        """Fuse the weights of ``llama``, which keeps working."""
        config = llama.config
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps: float = config.rms_norm_eps
        self.norm: Tensor = llama.norm.weight.detach()
        self.embedding: Tensor = llama.embed_tokens.weight.detach()
        self.rotary: nn.Module = llama.rotary_emb
        self.activation: Callable[[Tensor], Tensor] = llama.layers[0].mlp.act_fn
        self.layers = [
            _Layer(
                norm_attention=layer.input_layernorm.weight.detach(),
                qkv=fuse(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                out=fuse(layer.self_attn.o_proj),
                norm_mlp=layer.post_attention_layernorm.weight.detach(),
                gate_up=fuse(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=fuse(layer.mlp.down_proj),
            )
            for layer in llama.layers
        ]

    def start(self, pads: Tensor, capacity: int) -> KVRun:
        """Begin R rows; see `isic_ray.models.decoding.network.Network`."""
        return KVRun(self, pads, capacity)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return RMSNorm of ``x`` over its last dimension (Zhang and Sennrich 2019)."""
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def cache_bytes(self, slots: int) -> int:
        """Return the bytes of one row's key-value cache with that many slots."""
        numbers = 2 * len(self.layers) * self.kv_heads * self.head_dim * slots
        return numbers * self.embedding.element_size()


def fuse(*linears: nn.Linear) -> Projection:
    """Return the linear maps as one, outputs side by side, by the fastest kernel for their device.

    oneDNN with weights packed once beats the BLAS behind `F.linear` on CPUs (2x and more with
    AVX-512 on AMD, where MKL stays at AVX2), and it sums every row in the same order, whatever the
    number of rows. Elsewhere the modules' weights become views of the fused one.
    """
    first = linears[0]
    bias: Tensor | None = None
    if len(linears) == 1:
        weight = first.weight.detach()
        if first.bias is not None:
            bias = first.bias.detach()
    else:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        if first.bias is not None:
            bias = torch.cat([linear.bias.detach() for linear in linears])
    onednn = torch.ops.mkldnn
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if on_cpu and hasattr(onednn, "_reorder_linear_weight"):
        packed = onednn._reorder_linear_weight(weight)
        return lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], "")
    parts = torch.split(weight, [linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part  # a view, so that memory is not doubled
    return lambda x: F.linear(x, weight, bias)


class KVRun:
    """R rows in flight through a backbone: a key-value cache that `extend` fills left to right."""

    def __init__(self, backbone: Backbone, pads: Tensor, capacity: int) -> None:
        """Make room for ``capacity`` slots per row.

        Nobody attends to a row's leading ``pads`` int64 ``[R]`` slots.
        """
        weights, rows = backbone.embedding, len(pads)
        self.backbone, self.capacity = backbone, capacity
        shape = (len(backbone.layers), 2, rows, backbone.kv_heads, capacity, backbone.head_dim)
        self._cache = weights.new_zeros(shape)
        # keys and values [R*G,T,D] of each layer
        self._flat = [layer.flatten(1, 2).unbind(0) for layer in self._cache]
        # additive, of a single new position
        self._mask = weights.new_empty(rows, backbone.kv_heads, 1, capacity)
        self._flat_mask = self._mask.flatten(0, 1)
        self._slots = torch.arange(capacity, device=weights.device)
        # the slot that the next step writes
        self._at = torch.zeros(1, dtype=torch.long, device=weights.device)
        # cosines; sines, signed
        self._turn = weights.new_empty(2, rows, capacity, 1, backbone.head_dim)
        self.restart(pads)

    def restart(self, pads: Tensor) -> None:
        """Forget all positions and begin other rows, in the same memory."""
        self._visible = self._slots >= pads[:, None]  # [R,T]
        positions = (self._slots - pads[:, None]).clamp_min(0)
        # [R,T,D]; the first argument gives the dtype only
        cos, sin = self.backbone.rotary(self._cache, positions)
        # signed so that the rotated vector is x * cos + (x, halves swapped) * sin
        sin[..., : self.backbone.head_dim // 2].neg_()
        self._turn[0], self._turn[1] = cos[:, :, None], sin[:, :, None]
        self.filled = 0

    @property
    def filled(self) -> int:
        """Return how many slots are in use; assigning a smaller number rewinds to it."""
        return self._filled

    @filled.setter
    def filled(self, count: int) -> None:
        self._filled = count
        self._at.fill_(count)
        shown = self._visible & (self._slots < count)
        self._mask.copy_(_additive(shown, self._mask.dtype)[:, None, None])

    def first(self, rows: int) -> KVRun:
        """Return the first rows, to go on in the same memory without the others."""
        part = copy(self)
        part._cache = self._cache[:, :, :rows]
        part._visible = self._visible[:rows]
        part._turn = self._turn[:, :rows]
        part._flat = [layer.flatten(1, 2).unbind(0) for layer in part._cache]
        part._mask = self._mask[:rows]
        part._flat_mask = part._mask.flatten(0, 1)
        return part

    def copy_rows(self, other: KVRun, rows: Tensor) -> None:
        """Copy what ``other`` has read: row i becomes its row ``rows[i]``.

        Pads must already agree.
        """
        end = other.filled
        self._cache[..., :end, :] = other._cache[..., :end, :].index_select(2, rows)
        self.filled = end

    def extend(self, x: Tensor) -> Tensor:
        """Read embeddings ``[R,L,h]`` and return the last normed hidden states ``[R,h]``."""
        start, end = self._filled, self._filled + x.shape[1]
        hidden = self._forward(x, self._slots[start:end], end, self._causal_mask(start, end))
        self.filled = end
        return hidden

    def step(self, x: Tensor, attended: int = 0) -> Tensor:
        """Read one embedding per row ``[R,h]``; else as `extend`, with all state in tensors.

        Attention looks at ``attended`` slots, or at as many as are filled (0). More than are filled
        cost time and change nothing but the last bits.
        """
        self._filled += 1
        self._mask.index_fill_(-1, self._at, 0)
        hidden = self._forward(x[:, None], self._at, attended or self._filled, None)
        self._at += 1
        return hidden

    def count(self, steps: int) -> None:
        """Count steps that a graph replayed: it moves the tensors, not this object's number."""
        self._filled += steps

    def _forward(self, x: Tensor, at: Tensor, end: int, mask: Tensor | None) -> Tensor:
        """Return the last hidden states ``[R,h]`` of ``x`` ``[R,L,h]``, stored in slots ``at``."""
        model = self.backbone
        turn = self._turn.index_select(2, at).unbind(0)  # cosines, sines: [R,L,1,D]
        for index, layer in enumerate(model.layers):
            qkv = layer.qkv(model.rms_norm(x, layer.norm_attention))
            qkv = qkv.view(*x.shape[:2], -1, model.head_dim)
            x = x + layer.out(self._attend(index, qkv, turn, at, end, mask))
            gate, up = layer.gate_up(model.rms_norm(x, layer.norm_mlp)).chunk(2, dim=-1)
            x = x + layer.down(model.activation(gate).mul_(up))
        return model.rms_norm(x[:, -1], model.norm)

    def _attend(
        self,
        index: int,
        qkv: Tensor,
        turn: Sequence[Tensor],
        at: Tensor,
        end: int,
        mask: Tensor | None,
    ) -> Tensor:
        """Return what queries find in the first ``end`` slots ``[R,L,H*D]``.

        ``qkv`` ``[R,L,H+2G,D]`` is rotated, and its keys and values are stored in slots ``at``.
        Without ``mask`` (of several new positions) the one of a single position holds.
        """
        model = self.backbone
        rows, length, _, size = qkv.shape
        heads, groups = model.heads, model.kv_heads
        rotated = qkv[:, :, : heads + groups]
        swapped = rotated.roll(size // 2, -1)
        rotated.mul_(turn[0]).addcmul_(swapped, turn[1])
        stored = qkv[:, :, heads:].view(rows, length, 2, groups, size).permute(2, 0, 3, 1, 4)
        self._cache[index].index_copy_(3, at, stored)
        # The query heads of one key head run as further query positions: no key is repeated.
        share = heads // groups
        queries = qkv[:, :, :heads].view(rows, length, groups, share, size).permute(0, 2, 3, 1, 4)
        if mask is None and not qkv.is_cuda:
            # one position on a CPU: plain products take half the time of the fused operation
            keys, values = self._flat[index]
            flat = queries.reshape(rows * groups, share, size)
            shown = self._flat_mask[..., :end]
            scores = torch.baddbmm(shown, flat, keys[:, :end].mT, alpha=size**-0.5)
            return torch.bmm(scores.softmax(-1), values[:, :end]).view(rows, 1, -1)
        keys, values = self._cache[index, ..., :end, :]
        if mask is None:
            mask = self._mask[..., :end]
        elif share > 1:
            mask = mask.repeat(1, 1, share, 1)
        attended = F.scaled_dot_product_attention(
            queries.reshape(rows, groups, share * length, size), keys, values, attn_mask=mask
        )
        attended = attended.view(rows, groups, share, length, size).permute(0, 3, 1, 2, 4)
        return attended.reshape(rows, length, -1)

    def _causal_mask(self, start: int, end: int) -> Tensor:
        """Return the additive mask ``[R,1,L,T']`` of new positions ``start`` to ``end``."""
        keys = self._slots[:end]
        queries = keys[start:, None]
        # A padding slot may see itself: a row of the softmax without any key would be NaN, and
        # stay in the cache.
        allowed = (self._visible[:, None, :end] & (keys <= queries)) | (keys == queries)
        return _additive(allowed, self._mask.dtype)[:, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where ``allowed``, else -inf."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf"))
