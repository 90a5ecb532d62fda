"""What a decoding loop asks of a causal language model, and transformers' own models under it.

`isic_ray.models.decoding.backbone.Backbone` is the other, fused, implementation. Shapes: R rows in
flight, L positions, T cache slots, V words of the vocabulary, h hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache


class Reading(Protocol):
    """R rows that a network is reading."""

    filled: int  # positions read so far; assigning a smaller number rewinds to it

    def extend(self, x: Tensor) -> Tensor:
        """Read embeddings ``[R,L,h]`` and return the last normed hidden states ``[R,h]``."""
        ...

    def step(self, x: Tensor) -> Tensor:
        """Read one embedding per row ``[R,h]``; else as `extend`."""
        ...

    def first(self, rows: int) -> Reading:
        """Return the first rows, to go on from here without the others. This object is spent."""
        ...


class Network(Protocol):
    """A causal language model that reads embeddings."""

    embedding: Tensor  # [V,h]

    def start(self, pads: Tensor, capacity: int) -> Reading:
        """Begin R rows of at most ``capacity`` positions.

        Nobody attends to a row's leading ``pads`` int64 ``[R]`` positions.
        """
        ...


class StockNetwork:
    """A transformers text model as it is: for layers that `Backbone` lacks, and sharded models."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        parameters = inspect.signature(model.forward).parameters
        # transformers 5.24 renamed the argument
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

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
        """Return how many positions were read; assigning a smaller number rewinds to it."""
        return self._length

    @filled.setter
    def filled(self, length: int) -> None:
        self._cache.crop(length - self._length)
        self._length = length

    def extend(self, x: Tensor) -> Tensor:
        """Read embeddings; see `Reading`."""
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
        """Read one embedding per row; see `Reading`."""
        return self.extend(x[:, None])

    def first(self, rows: int) -> StockReading:
        """Return the first rows alone; see `Reading`."""
        self._visible, self._positions = self._visible[:rows], self._positions[:rows]
        self._cache.batch_select_indices(torch.arange(rows, device=self._visible.device))
        return self
