"""Models too large for one GPU: their decoder layers spread over all GPUs that a process sees, with accelerate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isic_ray.errors import UserError

SPREAD = "spread"  # what model.device says


def spread_map(kind: Any, directory: Path, devices: Sequence[int | str] | None = None) -> dict[str, int | str]:
    """transformers' ``device_map`` for class ``kind`` of the checkpoint in ``directory``, as config.json describes it.

    Layers go in order and evenly over ``devices`` (None: every GPU); all else, such as embeddings, heads, tokenizer and
    vision tower, to the first. Raises UserError without accelerate, or with fewer than two devices.
    """
    devices = list(range(torch.cuda.device_count())) if devices is None else devices
    if find_spec("accelerate") is None:
        raise UserError("model.device: spread needs accelerate; install isic-ray[spread]")
    if len(devices) < 2:
        raise UserError(
            f"model.device: spread needs two GPUs or more in each actor, which sees {len(devices)}; "
            "raise execution.gpus_per_actor, or set model.device to auto"
        )
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(directory))
    layers = model.get_decoder().layers
    place = {layer: devices[index * len(devices) // len(layers)] for index, layer in enumerate(layers)}
    return {name: place.get(part, devices[0]) for name, part in _parts(model, set(layers))}


def _parts(module: nn.Module, layers: set[nn.Module], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers, and the largest modules that hold none of them, by name."""
    for name, child in module.named_children():
        if child in layers or layers.isdisjoint(child.modules()):
            yield path + name, child
        else:
            yield from _parts(child, layers, f"{path}{name}.")
