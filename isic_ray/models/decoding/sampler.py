"""Draw Janus's visual tokens in bulk, the same tokens however the rows are batched.

Shapes: B samples, R rows in flight (B, twice that under guidance), h hidden size, K visual tokens,
N tokens per picture.

Why that takes care: a matrix product may round differently for other batch sizes (a BLAS picks its
kernel by shape), and one last bit can flip a sample, when the uniform falls between the two CDFs;
the probability is sum_k |dCDF_k|. Measured at K = 1024 in float32, batch 1 against 32: 3e-7 per
token for flat logits, 2e-5 for peaked ones. A shard of 128 pictures has thousands of tokens, and
bfloat16 is 2**16 times coarser. Rounding the logits to a grid does not help: it makes differences
rarer but larger, and the sum stays the same on average.

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
from isic_ray.models.decoding.backbone import Backbone, KVRun
from isic_ray.models.decoding.blocks import blocks, fitting_block, left_pad, out_of_memory
from isic_ray.models.decoding.choice import choose, row_uniforms

# Elastic blocks are filled up to a multiple of this many rows: kernels may differ for fewer, and
# each size of block costs memory.
ROWS = 4
BLOCK = 16  # rows or samples that run together where only blocks of one size agree
_LARGEST = 64  # samples that run together at the most
# On a GPU, attention looks at a multiple of this many slots, and each multiple has its own graph.
_SPAN = 64


class TokenSampler:
    """Draws N visual tokens for each prompt from its own seed."""

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
    ) -> None:
        """Set up drawing of pictures of ``tokens`` tokens.

        ``visual_table`` ``[K,h]`` embeds a drawn token (generation embedding and aligner folded
        into one). ``features`` maps the last hidden states ``[R,h]`` to what the linear ``head``
        turns into logits ``[B,K]``: being linear, ``head`` can wait until guidance has mixed the
        rows. In the rows without condition every prompt token outside ``kept_ids`` becomes
        ``pad_id`` and stays attended, as in transformers' Janus.
        """
        self.backbone, self.table, self.features, self.head = backbone, visual_table, features, head
        self.tokens, self.pad_id, self.kept_ids = tokens, pad_id, frozenset(kept_ids)
        self.span = _SPAN if visual_table.is_cuda else 1
        self.block = fitting_block(  # samples that run together at most
            _LARGEST, 2 * self.backbone.cache_bytes(self.tokens + _SPAN), self.table.device
        )
        self._elastic: dict[int, int] = {}  # by number of threads
        self._held: _Block | None = None  # the last block, kept for its graphs

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Return tokens int32 ``[B,N]`` on CPU for prompts of token ids.

        Row i depends on (prompts[i], seeds[i], settings) alone. When memory runs out, the samples
        that are not yet drawn run in blocks of half the size, and so do later ones. Raises
        ValueError when prompts and seeds differ in number.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        result = torch.empty(len(prompts), self.tokens, dtype=torch.int32)
        left = list(range(len(prompts)))  # samples not yet drawn
        while left:
            try:
                lengths = [len(prompts[i]) for i in left]
                for width, members in blocks(lengths, *self._sizes(settings, len(left))):
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

    def without_condition(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Return the prompt that guidance contrasts with ``prompt``: padding but for kept ids."""
        return tuple(i if i in self.kept_ids else self.pad_id for i in prompt)

    def elastic(self) -> int:
        """Return how far the size of a block may vary without a change in any row's bits.

        1: freely; `ROWS`: in multiples of that; 0: not at all. Tried once per number of threads.
        """
        threads = torch.get_num_threads()
        if threads not in self._elastic:
            tried = () if self.table.is_cuda else (1, ROWS)
            self._elastic[threads] = next((rows for rows in tried if self._rows_agree(rows)), 0)
        return self._elastic[threads]

    @torch.inference_mode()
    def _rows_agree(self, multiple: int) -> bool:
        """Return whether rows of blocks of a few multiples equal those of one large block."""
        generator = torch.Generator().manual_seed(0)
        rows, length = 2 * _LARGEST, 16
        x = self.table[torch.randint(len(self.table), (rows, length + 2), generator=generator)]
        pads = torch.randint(length, (rows,), generator=generator)

        def logits(members: slice) -> Tensor:
            run = KVRun(self.backbone, pads[members], length + 2)
            run.extend(x[members, :length])
            run.step(x[members, length])
            return self.head(self.features(run.step(x[members, length + 1])))

        whole = logits(slice(0, rows))
        sizes = [multiple * n for n in (1, 2, 3, 5, 8)]
        return all(torch.equal(logits(slice(n, 2 * n)), whole[n : 2 * n]) for n in sizes)

    def _sizes(self, settings: SamplingSettings, count: int) -> tuple[int, int]:
        """Return the most samples of a block, and what their number is a multiple of.

        ``count`` samples are left to draw.
        """
        rows = self.elastic()
        if not rows:
            size = self.block if self.table.is_cuda else min(self.block, BLOCK)
            return size, size
        always = settings.guided(self.tokens) == self.tokens
        multiple = ROWS // 2 if always else ROWS  # guidance doubles the rows, as long as it lasts
        if count == rows == 1:  # a picture alone
            multiple = 1
        return max(self.block, multiple), multiple

    @torch.inference_mode()
    def _draw_block(
        self, prompts: list[Sequence[int]], seeds: list[int], width: int, settings: SamplingSettings
    ) -> Tensor:
        held = self._held
        if held is None or not held.fits(len(prompts), width, settings):
            self._held = held = None  # frees its memory before the next one takes some
            held = _Block(self, len(prompts), width, settings)
            if self.table.is_cuda:
                self._held = held
        return held.draw(prompts, seeds, width).to("cpu", torch.int32)


class _Block:
    """One block of samples in flight.

    Its state lies in static tensors, so that a CUDA graph can capture a step and replay it.
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
        self.run = KVRun(sampler.backbone, pads, capacity)  # all rows
        self.rows = self.run  # those still drawn: rows without condition end with guidance
        self.uniforms = torch.empty(samples, sampler.tokens, dtype=torch.float64, device=device)
        self.tokens = torch.empty(samples, sampler.tokens, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.last = torch.empty(samples, dtype=torch.long, device=device)
        # (attended slots, whether guided) -> a captured step, or None after its first run
        self._graphs: dict[tuple[int, bool], Any] = {}

    def fits(self, samples: int, width: int, settings: SamplingSettings) -> bool:
        """Return whether this block can draw that many samples at that width, so."""
        return (samples, settings) == (self.samples, self.settings) and (
            width + self.sampler.tokens <= self.run.capacity
        )

    def draw(self, prompts: list[Sequence[int]], seeds: list[int], width: int) -> Tensor:
        """Return tokens int64 ``[B,N]`` for prompts that are padded to ``width`` ids."""
        self.uniforms.copy_(row_uniforms(seeds, self.sampler.tokens))
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
        """Read the prompts and return the last hidden states ``[R,h]``.

        Equal rows are read once where the size of a block may vary.
        """
        sampler = self.sampler
        rows = [tuple(prompt) for prompt in prompts]
        if self.guiding:
            rows += [sampler.without_condition(row) for row in rows]
        read = rows
        if sampler.elastic():
            distinct = list(dict.fromkeys(rows))
            distinct += distinct[:1] * (-len(distinct) % ROWS)
            read = distinct if len(distinct) < len(rows) else rows
        ids, pads = left_pad(read, width, sampler.pad_id, sampler.table.device)
        x = F.embedding(ids, sampler.backbone.embedding)
        if len(read) >= len(rows):
            self.run.restart(pads)
            return self.run.extend(x)
        where = {row: index for index, row in enumerate(read)}
        source = torch.tensor([where[row] for row in rows], device=ids.device)
        prefix = KVRun(sampler.backbone, pads, width)
        hidden = prefix.extend(x)
        self.run.restart(pads[source])
        self.run.copy_rows(prefix, source)
        return hidden[source]

    def _choose(self, hidden: Tensor) -> None:
        """Choose the tokens of the current column from hidden states ``[R,h]``, and go on."""
        features = self.sampler.features(hidden)
        if self.guiding:
            conditional, unconditional = features.chunk(2)
            features = torch.lerp(unconditional, conditional, self.settings.guidance)
        uniforms = self.uniforms.index_select(1, self.column)
        self.last.copy_(choose(self.sampler.head(features), uniforms, self.settings))
        self.tokens.index_copy_(1, self.column, self.last[:, None])
        self.column += 1

    def _step(self, attended: int) -> None:
        """Feed the last tokens, and choose the next."""
        x = F.embedding(self.last, self.sampler.table)
        self._choose(self.rows.step(x.repeat(2, 1) if self.guiding else x, attended))

    def _replay(self, attended: int) -> None:
        """Do `_step` from a CUDA graph.

        The first step of a kind runs as it is (and warms up), the second is captured.
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
