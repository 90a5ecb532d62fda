"""What families other than Janus need of a decoding loop: prompts as embeddings, row separators,
any network.

The contract is that of `isic_ray.models.decoding.sampler`: rows run in blocks of one size and at
widths that depend on their own prompt alone, one uniform a token comes from the row's own seed, and
tokens are found by inverse CDF. Shapes: B samples, R rows in flight (twice B under guidance), L
positions, h hidden size, V words of the vocabulary, K rows of the codebook, D tokens a position
(more than one for residual codebooks).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from isic_ray.errors import UserError
from isic_ray.models.base import SamplingSettings
from isic_ray.models.decoding.asking import yes_share
from isic_ray.models.decoding.blocks import blocks
from isic_ray.models.decoding.sampler import BLOCK, _uniforms, choose

Step = Callable[[Tensor, Tensor, SamplingSettings], tuple[Tensor, Tensor]]


class Reading(Protocol):
    """R rows in flight. Assigning a smaller ``filled`` rewinds."""

    filled: int

    def extend(self, x: Tensor) -> Tensor:
        """Feed embeddings ``[R,L,h]``; returns the normed hidden state of the last position
        ``[R,h]``.
        """
        ...

    def step(self, x: Tensor) -> Tensor:
        """`extend` by one embedding a row ``[R,h]``."""
        ...

    def first(self, rows: int) -> Reading:
        """The first rows alone, going on from here; the others' time is over."""
        ...


class Network(Protocol):
    """A causal language model: `isic_ray.models.decoding.backbone.Backbone` (fused) or
    `StockNetwork`.
    """

    embedding: Tensor  # [V,h]

    def start(self, pads: Tensor, capacity: int) -> Reading:
        """Begin R rows, whose leading ``pads`` int64 ``[R]`` slots nobody may attend to."""
        ...


class StockNetwork:
    """A transformers text model as it is, for layers that the fused loop does not know, and for
    sharded models.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = (
            "cache" if "cache" in parameters else "past_key_values"
        )  # renamed in transformers 5.24

    def start(self, pads: Tensor, capacity: int) -> StockReading:
        """Begin R rows; see `Network`."""
        return StockReading(self, pads, capacity)


class StockReading:
    """`Reading` with transformers' own cache."""

    def __init__(self, network: StockNetwork, pads: Tensor, capacity: int) -> None:
        slots = torch.arange(capacity, device=pads.device)
        self._network, self._length = network, 0
        self._visible = (slots >= pads[:, None]).long()  # [R,T]
        self._positions = (slots - pads[:, None]).clamp_min(0)
        self._cache = DynamicCache(config=network.model.config)

    @property
    def filled(self) -> int:
        """Positions read so far."""
        return self._length

    @filled.setter
    def filled(self, length: int) -> None:
        self._cache.crop(length - self._length)
        self._length = length

    def extend(self, x: Tensor) -> Tensor:
        """Feed embeddings; see `Reading`."""
        end = self._length + x.shape[1]
        outputs = self._network.model(
            inputs_embeds=x,
            attention_mask=self._visible[:, :end],
            position_ids=self._positions[:, self._length : end],
            use_cache=True,
            **{self._network.cache_name: self._cache},
        )
        self._length = end
        hidden: Tensor = outputs.last_hidden_state[:, -1]
        return hidden

    def step(self, x: Tensor) -> Tensor:
        """Feed one embedding a row; see `Reading`."""
        return self.extend(x[:, None])

    def first(self, rows: int) -> StockReading:
        """The first rows alone; see `Reading`."""
        self._visible, self._positions = self._visible[:rows], self._positions[:rows]
        self._cache.batch_select_indices(torch.arange(rows, device=self._visible.device))
        return self


class PictureSampler:
    """Draws the tokens of pictures, from prompts that are embeddings.

    ``step(hidden [R,h], uniforms [B,D], settings)`` returns the tokens ``[B,D]`` of the next
    position and the embedding ``[B,h]`` to feed for it; see `one_token`. With ``row`` > 0,
    ``separator`` ``[h]`` is fed after every ``row`` positions. ``width`` fixes the padded width of
    prompts; 0 pads to 16 or the next power of two.
    """

    def __init__(
        self,
        network: Network,
        step: Step,
        *,
        positions: int,
        depth: int = 1,
        row: int = 0,
        separator: Tensor | None = None,
        width: int = 0,
        block: int = BLOCK,
    ) -> None:
        self.network, self.step, self.positions, self.depth = network, step, positions, depth
        self.row, self.separator, self.width, self.block = row, separator, width, block

    @torch.inference_mode()
    def draw(
        self,
        conditional: Sequence[Tensor],
        unconditional: Sequence[Tensor],
        seeds: Sequence[int],
        settings: SamplingSettings,
    ) -> Tensor:
        """Tokens int32 ``[B,N*D]`` on CPU for embeddings ``[L,h]`` of each prompt with and without
        its condition.

        Row i depends on its own prompts and seed, and on the settings, alone. Raises ValueError for
        numbers that differ, or settings out of range.
        """
        if not len(conditional) == len(unconditional) == len(seeds):
            raise ValueError(
                f"{len(conditional)} prompts, {len(unconditional)} without condition, {len(seeds)} seeds"
            )
        if settings.temperature < 0 or settings.top_k < 0 or not 0 < settings.top_p <= 1:
            raise ValueError(
                f"temperature and top_k must not be negative and top_p must be in (0, 1]: {settings}"
            )
        result = torch.empty(len(seeds), self.positions * self.depth, dtype=torch.int32)
        lengths = [
            max(len(given), len(free))
            for given, free in zip(conditional, unconditional, strict=True)
        ]
        for bucket, rows in blocks(lengths, self.block):
            prompts = [conditional[i] for i in rows]
            if settings.guidance != 1:
                prompts += [unconditional[i] for i in rows]
            tokens = self._draw_block(
                prompts, [seeds[i] for i in rows], self.width or bucket, settings
            )
            result[torch.tensor(rows)] = tokens.flatten(1).to("cpu", torch.int32)
        return result

    def _draw_block(
        self, prompts: list[Tensor], seeds: list[int], width: int, settings: SamplingSettings
    ) -> Tensor:
        device, guided = prompts[0].device, settings.guided(self.positions)
        uniforms = torch.stack([_uniforms(seed, self.positions * self.depth) for seed in seeds]).to(
            device
        )
        uniforms = uniforms.view(len(seeds), self.positions, self.depth)
        tokens = torch.empty(uniforms.shape, dtype=torch.long, device=device)
        pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        x = torch.stack([F.pad(prompt, (0, 0, width - len(prompt), 0)) for prompt in prompts])
        separators = self.positions // self.row if self.row else 0
        reading = self.network.start(pads, width + self.positions + separators)
        hidden = reading.extend(x)
        for position in range(self.positions):
            tokens[:, position], fed = self.step(hidden, uniforms[:, position], settings)
            if position + 1 == self.positions:
                break
            if position + 1 == guided:
                reading, settings = reading.first(len(seeds)), replace(settings, guidance=1.0)
            hidden = reading.step(fed.repeat(2 if position + 1 < guided else 1, 1))
            if self.separator is not None and (position + 1) % self.row == 0:
                hidden = reading.step(self.separator.expand_as(hidden))
        return tokens


def one_token(table: Tensor, head: Callable[[Tensor], Tensor]) -> Step:
    """The step of families with one token a position: ``head`` gives logits ``[R,K]``, ``table``
    ``[K,h]`` is fed.
    """

    def step(hidden: Tensor, uniforms: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
        chosen = choose(guided(head(hidden), settings.guidance), uniforms, settings)
        return chosen[:, None], F.embedding(chosen, table)

    return step


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance ``[B,K]``: the first half of the rows has the condition, the
    second has none.
    """
    if guidance == 1:
        return logits
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    """``weight[ids]``, as a view where the ids follow one another (a vocabulary is large)."""
    first, count = int(ids[0]), len(ids)
    if torch.equal(ids.cpu(), torch.arange(first, first + count)):
        return weight[first : first + count]
    return weight[ids.to(weight.device)]


def answer_ids(tokenizer: Any, word: str) -> list[int]:
    """The ids of every one-token spelling of ``word``. Raises UserError when there is none."""
    spellings = [
        space + form for space in ("", " ") for form in (word, word.capitalize(), word.upper())
    ]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
    found = sorted({ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.unk_token_id})
    if not found:
        raise UserError(
            f"the tokenizer has no single token for {word!r}, so the model's verdict cannot be read"
        )
    return found


def ask(
    network: Network,
    head: Callable[[Tensor], Tensor],
    opening: Tensor,
    endings: Sequence[Tensor],
    answers: tuple[list[int], list[int]],
) -> Tensor:
    """P(yes) float32 ``[B,Q]`` after a common opening ``[B,L,h]`` and each question's ending
    ``[M,h]``.

    The mass of all one-token spellings of yes against those of no; the opening is read once.
    """
    pads = torch.zeros(len(opening), dtype=torch.long, device=opening.device)
    reading = network.start(pads, opening.shape[1] + max(len(ending) for ending in endings))
    reading.extend(opening)
    scores = []
    for ending in endings:
        reading.filled = opening.shape[1]
        scores.append(
            yes_share(head(reading.extend(ending.expand(len(opening), -1, -1))), *answers)
        )
    return torch.stack(scores, 1).cpu()
