"""A fused decoding loop for LLaMA-type backbones, whose results do not depend on how rows are batched.

Shapes: R rows of a block (B samples, twice that under guidance), L new positions, T cache slots, h hidden size,
H / G query / key-value heads, D head size, K visual tokens, N tokens a picture.

Why blocks. A matrix product rounds differently for other batch sizes (BLAS picks its kernel by shape), and one last
bit can flip a sample: the uniform falls between the two CDFs with probability sum_k |dCDF_k|. Measured at K = 1024 in
float32, batch 1 against 32: 3e-7 a token for flat logits, 2e-5 for peaked ones; a shard of 128 pictures has thousands
of tokens, and bfloat16 is 2**16 times coarser. Rounding the logits to a grid does not help: it makes differences rarer
but larger, and the sum stays the same on average. So every kernel always sees the same shapes. Samples run in blocks of
one size (short ones are filled up), and prompts are left-padded to a width that depends on their own length alone.
What is left is a row's place in its block, and no kernel in use was seen to depend on that (tests check it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isic_ray.models.base import SamplingSettings

BLOCK = 16  # rows run together; changing it changes last bits, and so, very rarely, a sample
_BLOCK_ON_GPU = 32  # samples run together on a GPU, where a step costs about the same for any few rows
_MIN_WIDTH = 16  # prompts are padded to this width, or to the next power of two
_STOP_CHECK = 8  # steps between looks at whether all texts have ended; each look waits for the device


@dataclass(frozen=True)
class _Layer:
    norm_attention: Tensor
    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    norm_mlp: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


class Backbone:
    """The weights of a transformers `LlamaModel`, fused for decoding. The module keeps working: it shares them."""

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
                qkv=_fuse(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                out=_fuse(layer.self_attn.o_proj),
                norm_mlp=layer.post_attention_layernorm.weight.detach(),
                gate_up=_fuse(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=_fuse(layer.mlp.down_proj),
            )
            for layer in llama.layers
        ]

    def start(self, pads: Tensor, capacity: int) -> Run:
        """Rows in flight, with room for ``capacity`` positions; see `isic_ray.models.decoding.Network`."""
        return Run(self, pads, capacity)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def _fuse(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One weight ``[sum of outputs, inputs]`` and bias; the linears become views into it, so memory is not doubled."""
    if len(linears) == 1:
        bias = linears[0].bias
        return linears[0].weight.detach(), None if bias is None else bias.detach()
    rows = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, torch.split(weight, rows), strict=True):
        linear.weight.data = part
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.detach() for linear in linears])


class Run:
    """R rows in flight through a backbone: a static key-value cache that `extend` fills from left to right.

    ``pads`` int64 ``[R]`` counts each row's leading slots that nobody may attend to. Assigning a smaller `filled`
    rewinds: the next `extend` overwrites what came after.
    """

    def __init__(self, backbone: Backbone, pads: Tensor, capacity: int) -> None:
        weights, rows = backbone.embedding, len(pads)
        self.backbone = backbone
        self.filled = 0
        slots = torch.arange(capacity, device=weights.device)
        self._visible = slots >= pads[:, None]  # [R,T]
        self._step_mask = _additive(self._visible, weights.dtype)[:, None, None]  # [R,1,1,T]
        positions = (slots - pads[:, None]).clamp_min(0)
        cos, sin = backbone.rotary(weights, positions)  # [R,T,D]; its first argument only gives the dtype
        self._cos, self._sin = cos[:, :, None], sin[:, :, None]
        shape = (len(backbone.layers), 2, rows, backbone.kv_heads, capacity, backbone.head_dim)
        self._cache = torch.zeros(shape, dtype=weights.dtype, device=weights.device)

    def extend(self, x: Tensor) -> Tensor:
        """Feed embeddings ``[R,L,h]``; returns the normed hidden state of the last position ``[R,h]``.

        With L = 1 all shapes but the attended length are constant: to capture a CUDA graph, attend to the whole cache
        through a mask that is updated in place.
        """
        model = self.backbone
        rows, length, _ = x.shape
        start, end = self.filled, self.filled + length
        mask = self._step_mask[..., :end] if length == 1 else self._causal_mask(start, end, x.dtype)
        for index, layer in enumerate(model.layers):
            qkv = F.linear(model.rms_norm(x, layer.norm_attention), *layer.qkv)
            attended = self._attend(index, qkv.view(rows, length, -1, model.head_dim), mask)
            x = x + F.linear(attended, *layer.out)
            gate, up = F.linear(model.rms_norm(x, layer.norm_mlp), *layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(model.activation(gate) * up, *layer.down)
        self.filled = end
        return model.rms_norm(x[:, -1], model.norm)

    def _attend(self, index: int, qkv: Tensor, mask: Tensor) -> Tensor:
        """Rotate, store keys and values, attend to the filled slots: ``[R,L,H+2G,D]`` → ``[R,L,H*D]``."""
        model = self.backbone
        rows, length, _, size = qkv.shape
        start, end, groups = self.filled, self.filled + length, model.kv_heads
        unrotated = qkv[:, :, : model.heads + groups]
        left, right = unrotated.chunk(2, dim=-1)
        rotated = unrotated * self._cos[:, start:end] + torch.cat((-right, left), -1) * self._sin[:, start:end]
        keys, values = self._cache[index]  # [R,G,T,D]
        keys[:, :, start:end] = rotated[:, :, model.heads :].transpose(1, 2)
        values[:, :, start:end] = qkv[:, :, model.heads + groups :].transpose(1, 2)
        # The query heads that share a key head ride along as extra query positions, so nothing is repeated.
        share = model.heads // groups
        queries = rotated[:, :, : model.heads].reshape(rows, length, groups, share, size).permute(0, 2, 3, 1, 4)
        if length > 1 and share > 1:
            mask = mask.repeat(1, 1, share, 1)
        attended = F.scaled_dot_product_attention(
            queries.reshape(rows, groups, share * length, size), keys[:, :, :end], values[:, :, :end], attn_mask=mask
        )
        return attended.view(rows, groups, share, length, size).permute(0, 3, 1, 2, 4).reshape(rows, length, -1)

    def _causal_mask(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        keys = torch.arange(end, device=self._visible.device)
        queries = keys[start:, None]
        # A padding slot may see itself: a row of the softmax without any key would be NaN and poison the cache.
        allowed = (self._visible[:, None, :end] & (keys <= queries)) | (keys == queries)
        return _additive(allowed, dtype)[:, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


class TokenSampler:
    """Draws N visual tokens for each prompt from its own seed.

    ``visual_table`` ``[K,h]`` embeds a drawn token (generation embedding and aligner folded into one), ``head`` maps
    the last hidden state ``[R,h]`` to logits ``[R,K]``. In the unconditional rows of classifier-free guidance every
    prompt token outside ``kept_ids`` becomes ``pad_id`` and stays attended, as in transformers' Janus.
    """

    def __init__(
        self,
        backbone: Backbone,
        visual_table: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        tokens: int,
        pad_id: int,
        kept_ids: Sequence[int],
        block: int = 0,
    ) -> None:
        """``block`` samples run together; 0 chooses by device."""
        self.backbone, self.table, self.head = backbone, visual_table, head
        self.tokens, self.pad_id = tokens, pad_id
        self.block = block or (_BLOCK_ON_GPU if visual_table.is_cuda else BLOCK)
        self.kept_ids = torch.tensor(list(kept_ids), device=visual_table.device)

    @torch.no_grad()
    def draw(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings) -> Tensor:
        """Tokens int32 ``[B,N]`` on CPU for prompt ids. Row i depends on (prompts[i], seeds[i], settings) alone.

        Raises ValueError when prompts and seeds differ in number, or for settings out of range.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        if settings.temperature < 0 or settings.top_k < 0 or not 0 < settings.top_p <= 1:
            raise ValueError(f"temperature and top_k must not be negative and top_p must be in (0, 1]: {settings}")
        result = torch.empty(len(prompts), self.tokens, dtype=torch.int32)
        for width, rows in blocks([len(prompt) for prompt in prompts], self.block):
            tokens = self._draw_block([prompts[i] for i in rows], [seeds[i] for i in rows], width, settings)
            result[torch.tensor(rows)] = tokens.to("cpu", torch.int32)  # a filler row rewrites its own result
        return result

    def _draw_block(
        self, prompts: list[Sequence[int]], seeds: list[int], width: int, settings: SamplingSettings
    ) -> Tensor:
        guided = settings.guidance != 1
        device = self.table.device
        ids, pads = left_pad(prompts, width, self.pad_id, device)
        if guided:
            unconditional = torch.where(torch.isin(ids, self.kept_ids), ids, self.pad_id)
            ids, pads = torch.cat([ids, unconditional]), pads.repeat(2)
        uniforms = torch.stack([_uniforms(seed, self.tokens) for seed in seeds]).to(device)
        tokens = torch.empty(len(prompts), self.tokens, dtype=torch.long, device=device)
        run = self.backbone.start(pads, width + self.tokens)
        hidden = run.extend(F.embedding(ids, self.backbone.embedding))
        for step in range(self.tokens):
            chosen = _choose(self.head(hidden), uniforms[:, step], settings)
            tokens[:, step] = chosen
            if step + 1 < self.tokens:
                fed = chosen.repeat(2) if guided else chosen
                hidden = run.extend(F.embedding(fed, self.table)[:, None])
        return tokens


@torch.no_grad()
def complete_greedily(
    backbone: Any,
    lm_head: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    limit: int,
    block: int = BLOCK,
) -> list[list[int]]:
    """The likeliest next token, again and again, for each prompt: at most ``limit`` ids, without the stop token."""
    device = backbone.embedding.device
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    results: list[list[int]] = [[] for _ in prompts]
    for width, rows in blocks([len(prompt) for prompt in prompts], block):
        ids, pads = left_pad([prompts[i] for i in rows], width, pad_id, device)
        run = backbone.start(pads, width + limit)
        hidden = run.extend(F.embedding(ids, backbone.embedding))
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        drawn: list[Tensor] = []
        for step in range(limit):
            chosen = lm_head(hidden).argmax(-1)
            drawn.append(chosen)
            ended |= torch.isin(chosen, stops)
            if step + 1 == limit or (step % _STOP_CHECK == _STOP_CHECK - 1 and bool(ended.all())):
                break
            hidden = run.extend(F.embedding(chosen, backbone.embedding)[:, None])
        for i, row in zip(rows, torch.stack(drawn, 1).tolist(), strict=True):
            cut = next((at for at, token in enumerate(row) if token in stop_ids), len(row))
            results[i] = row[:cut]
    return results


def blocks(lengths: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Group rows by padded prompt width into blocks of exactly ``size`` row indices; the first one fills up a rest."""
    by_width: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_width.setdefault(max(_MIN_WIDTH, 1 << (length - 1).bit_length()), []).append(row)
    for width, rows in sorted(by_width.items()):
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            yield width, block + block[:1] * (size - len(block))


def left_pad(prompts: Sequence[Sequence[int]], width: int, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``[R,width]`` with padding in front, and its length ``[R]``; both int64."""
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[pad_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(pads, device=device)


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _choose(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """One token a sample ``[B]`` from logits ``[R,K]`` (conditional rows first) and uniforms ``[B]``."""
    scores = logits.double()
    if settings.guidance != 1:
        conditional, unconditional = scores.chunk(2)
        scores = unconditional + settings.guidance * (conditional - unconditional)
    if settings.temperature == 0:
        return scores.argmax(-1)
    return inverse_cdf(filter_scores(scores / settings.temperature, settings.top_k, settings.top_p), uniforms)


def filter_scores(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores ``[B,K]`` with -inf outside the top k (0: all), then outside the smallest set of mass ``top_p``."""
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        drop = mass.cumsum(-1) - mass >= top_p  # the likeliest is always kept
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return scores


def inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The token ``[B]`` at which the CDF of softmax(``scores`` float64 ``[B,K]``) passes ``uniforms`` ``[B]``."""
    cdf = scores.softmax(-1).cumsum(-1)
    total = cdf[:, -1:]
    # Rounding may carry u * total up to total, beyond the last token of positive probability.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)
