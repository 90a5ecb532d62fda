"""Bulk sampling of visual tokens, whose results do not depend on how rows are batched.

Shapes: B samples, R rows (B, twice that under guidance), h hidden size, K visual tokens, N tokens a
picture.

Why that takes care. A matrix product may round differently for other batch sizes (a BLAS picks its
kernel by shape), and one last bit can flip a sample: the uniform falls between the two CDFs with
probability sum_k |dCDF_k|. Measured at K = 1024 in float32, batch 1 against 32: 3e-7 a token for
flat logits, 2e-5 for peaked ones; a shard of 128 pictures has thousands of tokens, and bfloat16 is
2**16 times coarser. Rounding the logits to a grid does not help: it makes differences rarer but
larger, and the sum stays the same on average.

So blocks are formed in one of two ways. On a CPU, `Backbone` uses kernels that give a row the same
bits in any block, or in any of a multiple of `ROWS` rows; each process tries that on its own
weights before it relies on it. Elsewhere (a GPU, or a CPU that fails the trials) kernels always see
the same shapes: blocks of one size, short ones filled up. Prompts are left-padded to a width that
depends on their own length alone.

All pictures of a model have equally many tokens, so the rows of a block end together and none
idles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.models.base import SamplingSettings
from isic_ray.models.decoding.backbone import Backbone, Run
from isic_ray.models.decoding.blocks import blocks, left_pad, out_of_memory

# Rows that elastic blocks are filled up to a multiple of: kernels may differ below, and each size
# of block costs memory
ROWS = 4
BLOCK = 16  # rows or samples that run together where only blocks of one size agree
_LARGEST = 64  # samples that run together at the most
# on a GPU, attention looks at a multiple of this many slots, and each multiple has a graph of its
# own
_SPAN = 64
_STOP_CHECK = (
    8  # steps between looks at whether all texts have ended; each look waits for the device
)


class TokenSampler:
    """Draws N visual tokens for each prompt from its own seed.

    ``visual_table`` ``[K,h]`` embeds a drawn token (generation embedding and aligner folded into
    one). ``features`` maps the last hidden state ``[R,h]`` to what the linear ``head`` turns into
    logits ``[B,K]``: being linear, it can wait until guidance has mixed the rows. In the
    unconditional rows every prompt token outside ``kept_ids`` becomes ``pad_id`` and stays
    attended, as in transformers' Janus.
    """

    def __init__(
        self,
        backbone: Backbone,
        visual_table: Tensor,
        features: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        *,
        tokens: int,
        pad_id: int,
        kept_ids: Sequence[int],
        block: int = 0,
    ) -> None:
        """``block`` samples run together at the most; 0 chooses by device."""
        self.backbone, self.table, self.features, self.head = backbone, visual_table, features, head
        self.tokens, self.pad_id, self.kept_ids = tokens, pad_id, frozenset(kept_ids)
        self.span = _SPAN if visual_table.is_cuda else 1
        self.block = block or self._fitting_block()
        self._elastic: dict[int, int] = {}  # by number of threads
        self._held: _Block | None = None

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Tokens int32 ``[B,N]`` on CPU for prompt ids. Row i depends on (prompts[i], seeds[i],
        settings) alone.

        When memory runs out, the samples in hand are drawn again in blocks of half the size, and
        later ones too. Raises ValueError when prompts and seeds differ in number, or for settings
        out of range.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        if settings.temperature < 0 or settings.top_k < 0 or not 0 < settings.top_p <= 1:
            raise ValueError(
                f"temperature and top_k must not be negative and top_p must be in (0, 1]: {settings}"
            )
        result = torch.empty(len(prompts), self.tokens, dtype=torch.int32)
        left = list(range(len(prompts)))
        while left:
            try:
                for width, members in blocks(
                    [len(prompts[i]) for i in left], *self._sizes(settings, len(left))
                ):
                    rows = [left[i] for i in members]
                    tokens = self._draw_block(
                        [prompts[i] for i in rows], [seeds[i] for i in rows], width, settings
                    )
                    result[torch.tensor(rows)] = tokens  # a filler row rewrites its own result
                    left = [-1 if i in rows else i for i in left]
            except RuntimeError as error:
                if not out_of_memory(error) or self.block == 1:
                    raise
                self.block, self._held = self.block // 2, None
            left = [i for i in left if i >= 0]
        return result

    def elastic(self) -> int:
        """1 where a row keeps its bits in any block, `ROWS` where it does in multiples of that,
        else 0; tried once.
        """
        threads = torch.get_num_threads()
        if threads not in self._elastic:
            tried = () if self.table.is_cuda else (1, ROWS)
            self._elastic[threads] = next((rows for rows in tried if self._rows_agree(rows)), 0)
        return self._elastic[threads]

    @torch.inference_mode()
    def _rows_agree(self, multiple: int) -> bool:
        generator = torch.Generator().manual_seed(0)
        rows, length = 2 * _LARGEST, 16
        x = self.table[torch.randint(len(self.table), (rows, length + 2), generator=generator)]
        pads = torch.randint(length, (rows,), generator=generator)

        def logits(members: slice) -> Tensor:
            run = Run(self.backbone, pads[members], length + 2)
            run.extend(x[members, :length])
            run.step(x[members, length])
            return self.head(self.features(run.step(x[members, length + 1])))

        whole = logits(slice(0, rows))
        sizes = [multiple * n for n in (1, 2, 3, 5, 8)]
        return all(torch.equal(logits(slice(n, 2 * n)), whole[n : 2 * n]) for n in sizes)

    def _sizes(self, settings: SamplingSettings, count: int) -> tuple[int, int]:
        """Samples of a block at the most, and what their number is a multiple of."""
        rows = self.elastic()
        if not rows:
            size = self.block if self.table.is_cuda else min(self.block, BLOCK)
            return size, size
        always = settings.guided(self.tokens) == self.tokens
        multiple = ROWS // 2 if always else ROWS  # guidance doubles the rows, as long as it lasts
        if count == rows == 1:  # a picture alone
            multiple = 1
        return max(self.block, multiple), multiple

    def _fitting_block(self) -> int:
        """A power of two whose cache takes at most half of a GPU's memory (all of it, so that it
        never varies).
        """
        block = _LARGEST
        if self.table.is_cuda:
            total = torch.cuda.get_device_properties(self.table.device).total_memory
            while (
                block > 1 and 2 * block * self.backbone.cache_bytes(self.tokens + _SPAN) > total / 2
            ):
                block //= 2
        return block

    @torch.inference_mode()
    def _draw_block(
        self, prompts: list[Sequence[int]], seeds: list[int], width: int, settings: SamplingSettings
    ) -> Tensor:
        held = self._held
        if held is None or not held.fits(len(prompts), width, settings):
            self._held = held = None  # its memory first
            held = _Block(self, len(prompts), width, settings)
            if self.table.is_cuda:  # for its graphs
                self._held = held
        return held.draw(prompts, seeds, width).to("cpu", torch.int32)


class _Block:
    """One block of samples in flight. Its state is static tensors, so that a step can be
    captured and replayed.
    """

    def __init__(
        self, sampler: TokenSampler, samples: int, width: int, settings: SamplingSettings
    ) -> None:
        self.sampler, self.settings, self.samples = sampler, settings, samples
        self.guided = settings.guided(sampler.tokens)  # tokens that are drawn with guidance
        self.guiding = self.guided > 0
        device, span = sampler.table.device, sampler.span
        capacity = -(-(width + sampler.tokens) // span) * span
        pads = torch.zeros(samples * (1 + self.guiding), dtype=torch.long, device=device)
        self.run = self.rows = Run(
            sampler.backbone, pads, capacity
        )  # all rows; those that still run
        self.uniforms = torch.empty(samples, sampler.tokens, dtype=torch.float64, device=device)
        self.tokens = torch.empty(samples, sampler.tokens, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.last = torch.empty(samples, dtype=torch.long, device=device)
        self._graphs: dict[
            tuple[int, bool], Any
        ] = {}  # attended slots, whether guided → a captured step

    def fits(self, samples: int, width: int, settings: SamplingSettings) -> bool:
        return (samples, settings) == (self.samples, self.settings) and (
            width + self.sampler.tokens <= self.run.capacity
        )

    def draw(self, prompts: list[Sequence[int]], seeds: list[int], width: int) -> Tensor:
        """Tokens int64 ``[B,N]``."""
        self.uniforms.copy_(torch.stack([_uniforms(seed, self.sampler.tokens) for seed in seeds]))
        self.column.zero_()
        self.rows, self.guiding = self.run, self.guided > 0
        self._choose(self._read(prompts, width))
        for drawn in range(1, self.sampler.tokens):
            if self.guiding and drawn == self.guided:
                self.rows, self.guiding = self.run.first(self.samples), False
            span = self.sampler.span
            attended = -(-(self.rows.filled + 1) // span) * span
            if self.sampler.table.is_cuda:
                self._replay(attended)
            else:
                self._step(attended)
        return self.tokens

    def _read(self, prompts: list[Sequence[int]], width: int) -> Tensor:
        """Feed the prompts; the last hidden state ``[R,h]``. Equal rows are read once where
        block sizes may vary.
        """
        sampler = self.sampler
        rows = [tuple(prompt) for prompt in prompts]
        if self.guiding:
            rows += [
                tuple(i if i in sampler.kept_ids else sampler.pad_id for i in row) for row in rows
            ]
        read = rows
        if sampler.elastic():
            read = list(dict.fromkeys(rows))
            read += read[:1] * (-len(read) % ROWS)
            read = read if len(read) < len(rows) else rows
        ids, pads = left_pad(read, width, sampler.pad_id, sampler.table.device)
        x = F.embedding(ids, sampler.backbone.embedding)
        if len(read) >= len(rows):
            self.run.restart(pads)
            return self.run.extend(x)
        where = {row: index for index, row in enumerate(read)}
        source = torch.tensor([where[row] for row in rows], device=ids.device)
        prefix = Run(sampler.backbone, pads, width)
        hidden = prefix.extend(x)
        self.run.restart(pads[source])
        self.run.copy_rows(prefix, source)
        return hidden[source]

    def _choose(self, hidden: Tensor) -> None:
        features = self.sampler.features(hidden)
        if self.guiding:
            conditional, unconditional = features.chunk(2)
            features = torch.lerp(unconditional, conditional, self.settings.guidance)
        uniforms = self.uniforms.index_select(1, self.column)
        self.last.copy_(choose(self.sampler.head(features), uniforms, self.settings))
        self.tokens.index_copy_(1, self.column, self.last[:, None])
        self.column += 1

    def _step(self, attended: int) -> None:
        x = F.embedding(self.last, self.sampler.table)
        self._choose(self.rows.step(x.repeat(2, 1) if self.guiding else x, attended))

    def _replay(self, attended: int) -> None:
        """The step from a CUDA graph. The first of a length runs as it is (and warms up), the
        second is captured.
        """
        kind = attended, self.guiding
        if kind not in self._graphs:
            self._graphs[kind] = None
            self._step(attended)
            return
        if self._graphs[kind] is None:
            graph = torch.cuda.CUDAGraph()
            pool = next((known.pool() for known in self._graphs.values() if known), None)
            with torch.cuda.graph(graph, pool=pool):
                self._step(attended)  # records, and counts the slot, but runs nothing yet
            self._graphs[kind] = graph
        else:
            self.rows.count(1)
        self._graphs[kind].replay()


@torch.inference_mode()
def complete_greedily(
    backbone: Any,  # a Backbone, or another network of isic_ray.models.decoding.picture_sampler
    lm_head: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    limit: int,
    block: int = BLOCK,
) -> list[list[int]]:
    """The likeliest next token, again and again, for each prompt: at most ``limit`` ids, without
    the stop token.
    """
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
            hidden = run.step(F.embedding(chosen, backbone.embedding))
        for i, row in zip(rows, torch.stack(drawn, 1).tolist(), strict=True):
            cut = next((at for at, token in enumerate(row) if token in stop_ids), len(row))
            results[i] = row[:cut]
    return results


def _uniforms(seed: int, count: int) -> Tensor:
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return uniforms * (
        1 - 2.0**-50
    )  # so that u * total is below total however it rounds: see `inverse_cdf`


def choose(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """One token a sample ``[B]`` from logits ``[B,K]`` (guidance done) and uniforms float64
    ``[B,1]``.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / settings.temperature
    return inverse_cdf(filter_scores(scores, settings.top_k, settings.top_p), uniforms)


def filter_scores(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores ``[B,K]`` with -inf outside the top k (0: all), then outside the smallest set of
    mass ``top_p``.
    """
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        drop = mass.cumsum(-1) - mass >= top_p  # the likeliest is always kept
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return scores


def inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The token ``[B]`` at which the CDF of softmax(``scores`` ``[B,K]``) passes ``uniforms``
    float64 ``[B,1]``.

    Uniforms are at most 1 - 2**-52, else rounding may carry one past the last token of positive
    probability.
    """
    cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).squeeze(-1)
