"""From published PyTorch checkpoints (pickles) to safetensors, once, without executing anything in them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from isic_ray.errors import UserError
from isic_ray.models.checkpoints import first_line

_WRAPPERS = ("state_dict", "model", "module", "ema")  # Lightning, DDP, DeepSpeed; the first that is there


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt``, ``.pth`` or ``.ckpt`` file, by name.

    It is read with ``weights_only``: a file that needs more than tensors and plain containers is refused. Raises
    UserError for such a file, a missing or damaged one, and one without tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read safely as tensors: {first_line(error)}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)} if content else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    return tensors


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, partial)
    partial.replace(path)
