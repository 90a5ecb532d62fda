"""A LLaMA-type backbone fused for decoding, and a run of rows through it with a static key-value
cache.

Shapes: R rows, L new positions, T cache slots, h hidden size, H / G query / key-value heads, D head
size.

Everything that changes from one step to the next (position, mask, cache) lies in tensors that are
written in place, so that a step can be captured in a CUDA graph and replayed.
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
    norm_attention: Tensor
    qkv: Projection
    out: Projection
    norm_mlp: Tensor
    gate_up: Projection
    down: Projection


class Backbone:
    """The weights of a transformers `LlamaModel`, fused for decoding. The module keeps working.

    On a GPU the module shares the fused weights. On a CPU they are packed for oneDNN, a second copy
    in memory.
    """

    def __init__(self, llama: Any) -> None:
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

    def start(self, pads: Tensor, capacity: int) -> Run:
        """Rows in flight, with room for ``capacity`` positions; see
        `isic_ray.models.decoding.picture_sampler.Network`.
        """
        return Run(self, pads, capacity)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def cache_bytes(self, slots: int) -> int:
        """Memory of one row's key-value cache with that many slots."""
        return (
            2
            * len(self.layers)
            * self.kv_heads
            * self.head_dim
            * slots
            * self.embedding.element_size()
        )


def fuse(*linears: nn.Linear) -> Projection:
    """The linear maps as one, outputs side by side, by the fastest kernel for their device.

    oneDNN with weights packed once beats the BLAS behind `F.linear` on CPUs (2x and more with
    AVX-512 on AMD, where MKL stays at AVX2), and it sums every row in the same order, whatever the
    number of rows.
    """
    first = linears[0]
    if len(linears) == 1:
        weight, bias = first.weight.detach(), None if first.bias is None else first.bias.detach()
    else:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bias = (
            None if first.bias is None else torch.cat([linear.bias.detach() for linear in linears])
        )
    onednn = torch.ops.mkldnn
    if (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and hasattr(onednn, "_reorder_linear_weight")
    ):
        packed = onednn._reorder_linear_weight(weight)
        return lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], "")
    for linear, part in zip(
        linears, torch.split(weight, [linear.out_features for linear in linears]), strict=True
    ):
        linear.weight.data = part  # a view, so that memory is not doubled
    return lambda x: F.linear(x, weight, bias)


class Run:
    """R rows in flight through a backbone: a static key-value cache that `extend` fills from left
    to right.

    ``pads`` int64 ``[R]`` counts each row's leading slots that nobody may attend to.
    """

    def __init__(self, backbone: Backbone, pads: Tensor, capacity: int) -> None:
        weights, rows = backbone.embedding, len(pads)
        self.backbone, self.capacity = backbone, capacity
        shape = (len(backbone.layers), 2, rows, backbone.kv_heads, capacity, backbone.head_dim)
        self._cache = weights.new_zeros(shape)
        self._flat = [
            layer.flatten(1, 2).unbind(0) for layer in self._cache
        ]  # keys and values [R*G,T,D] a layer
        self._mask = weights.new_empty(
            rows, backbone.kv_heads, 1, capacity
        )  # additive, of a single new position
        self._flat_mask = self._mask.flatten(0, 1)
        self._slots = torch.arange(capacity, device=weights.device)
        self._at = torch.zeros(
            1, dtype=torch.long, device=weights.device
        )  # where the next step writes
        self._turn = weights.new_empty(
            2, rows, capacity, 1, backbone.head_dim
        )  # cosines; sines, signed
        self.restart(pads)

    def restart(self, pads: Tensor) -> None:
        """Forget all positions and take other rows, in place."""
        self._visible = self._slots >= pads[:, None]  # [R,T]
        positions = (self._slots - pads[:, None]).clamp_min(0)
        cos, sin = self.backbone.rotary(
            self._cache, positions
        )  # [R,T,D]; its first argument only gives the dtype
        sin[
            ..., : self.backbone.head_dim // 2
        ].neg_()  # the rotated vector is x * cos + (x, halves swapped) * this
        self._turn[0], self._turn[1] = cos[:, :, None], sin[:, :, None]
        self.filled = 0

    @property
    def filled(self) -> int:
        """Slots in use. Assigning a smaller number rewinds: what came after is overwritten."""
        return self._filled

    @filled.setter
    def filled(self, count: int) -> None:
        self._filled = count
        self._at.fill_(count)
        shown = self._visible & (self._slots < count)
        self._mask.copy_(_additive(shown, self._mask.dtype)[:, None, None])

    def first(self, rows: int) -> Run:
        """The first rows alone, going on from here in the same memory; the others' time is over."""
        part = copy(self)
        part._cache, part._visible, part._turn = (
            self._cache[:, :, :rows],
            self._visible[:rows],
            self._turn[:, :rows],
        )
        part._flat = [layer.flatten(1, 2).unbind(0) for layer in part._cache]
        part._mask = self._mask[:rows]
        part._flat_mask = part._mask.flatten(0, 1)
        return part

    def copy_rows(self, other: Run, rows: Tensor) -> None:
        """Take over what ``other`` has read: row i becomes its row ``rows[i]``. Pads must
        already agree.
        """
        end = other.filled
        self._cache[..., :end, :] = other._cache[..., :end, :].index_select(2, rows)
        self.filled = end

    def extend(self, x: Tensor) -> Tensor:
        """Feed embeddings ``[R,L,h]``; returns the normed hidden state of the last position
        ``[R,h]``.
        """
        start, end = self._filled, self._filled + x.shape[1]
        hidden = self._forward(x, self._slots[start:end], end, self._causal_mask(start, end))
        self.filled = end
        return hidden

    def step(self, x: Tensor, attended: int = 0) -> Tensor:
        """`extend` by one embedding a row ``[R,h]``, all state in tensors: the slots to look at are
        ``attended``, or as many as are filled. More than that costs time and changes nothing but
        the last bits.
        """
        self._filled += 1
        self._mask.index_fill_(-1, self._at, 0)
        hidden = self._forward(x[:, None], self._at, attended or self._filled, None)
        self._at += 1
        return hidden

    def count(self, steps: int) -> None:
        """Count steps that were replayed from a graph, which moved the tensors but not this
        object's number.
        """
        self._filled += steps

    def _forward(self, x: Tensor, at: Tensor, end: int, mask: Tensor | None) -> Tensor:
        model = self.backbone
        turn = self._turn.index_select(2, at).unbind(0)  # cosines, sines: [R,L,1,D]
        for index, layer in enumerate(model.layers):
            qkv = layer.qkv(model.rms_norm(x, layer.norm_attention))
            x = x + layer.out(
                self._attend(index, qkv.view(*x.shape[:2], -1, model.head_dim), turn, at, end, mask)
            )
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
        """Rotate, store keys and values, attend to the first ``end`` slots: ``[R,L,H+2G,D]`` →
        ``[R,L,H*D]``.
        """
        model = self.backbone
        rows, length, _, size = qkv.shape
        heads, groups = model.heads, model.kv_heads
        rotated = qkv[:, :, : heads + groups]
        swapped = rotated.roll(size // 2, -1)
        rotated.mul_(turn[0]).addcmul_(swapped, turn[1])
        stored = qkv[:, :, heads:].view(rows, length, 2, groups, size).permute(2, 0, 3, 1, 4)
        self._cache[index].index_copy_(3, at, stored)
        share = (
            heads // groups
        )  # query heads of a key head ride along as further query positions: nothing is repeated
        queries = qkv[:, :, :heads].view(rows, length, groups, share, size).permute(0, 2, 3, 1, 4)
        if (
            mask is None and not qkv.is_cuda
        ):  # one position on a CPU: plain products take half the time of the fused op
            keys, values = self._flat[index]
            flat = queries.reshape(rows * groups, share, size)
            scores = torch.baddbmm(
                self._flat_mask[..., :end], flat, keys[:, :end].mT, alpha=size**-0.5
            )
            return torch.bmm(scores.softmax(-1), values[:, :end]).view(rows, 1, -1)
        keys, values = self._cache[index, ..., :end, :]
        if mask is None:
            mask = self._mask[..., :end]
        elif share > 1:
            mask = mask.repeat(1, 1, share, 1)
        attended = F.scaled_dot_product_attention(
            queries.reshape(rows, groups, share * length, size), keys, values, attn_mask=mask
        )
        return (
            attended.view(rows, groups, share, length, size)
            .permute(0, 3, 1, 2, 4)
            .reshape(rows, length, -1)
        )

    def _causal_mask(self, start: int, end: int) -> Tensor:
        keys = self._slots[:end]
        queries = keys[start:, None]
        # A padding slot may see itself: a row of the softmax without any key would be NaN and
        # poison the cache.
        allowed = (self._visible[:, None, :end] & (keys <= queries)) | (keys == queries)
        return _additive(allowed, self._mask.dtype)[:, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, float("-inf")
    )
