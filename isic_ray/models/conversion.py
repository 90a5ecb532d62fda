"""Convert published PyTorch checkpoints (pickles) to safetensors, and execute nothing in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from isic_ray.errors import UserError
from isic_ray.models.checkpoints import first_line

# Keys under which Lightning, DDP and DeepSpeed keep the weights; the first that is there counts.
_WRAPPERS = ("state_dict", "model", "module", "ema")
# Heads of the published LlamaGen sizes by width (B, L, XL, XXL, 1B, XXXL, 3B, 7B): the weights do
# not tell.
_LLAMAGEN_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}


def read_published(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.pt``, ``.pth`` or ``.ckpt`` file, by name.

    torch reads it with ``weights_only``, which refuses a file that needs more than tensors and
    plain containers. Raises UserError for such a file, a missing or damaged one, and one without
    tensors.
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
    named = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    return tensors


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, partial, {"format": "pt"})
    partial.replace(path)


def convert_llamagen(
    gpt: Path, vq: Path, text_encoder: Path, to: Path, image_size: int, heads: int = 0
) -> None:
    """Write the directory ``to`` that the LlamaGen adapter loads.

    From the published transformer ``gpt`` and tokenizer ``vq``, and a FLAN-T5 directory. Pictures
    have ``image_size`` pixels a side; ``heads`` of the transformer need only be given (not 0) for
    sizes that are not published. Raises UserError for files that are not LlamaGen's text-to-image
    weights.
    """
    weights, tokenizer = read_published(gpt), read_published(vq)
    if "cls_embedding.uncond_embedding" not in weights or "tok_embeddings.weight" not in weights:
        raise UserError(f"{gpt} does not hold a LlamaGen text-to-image transformer")
    if "quantize.embedding.weight" not in tokenizer:
        raise UserError(
            f"{vq} does not hold a LlamaGen tokenizer: it has no quantize.embedding.weight"
        )
    if not (text_encoder / "config.json").is_file():
        raise UserError(
            f"{text_encoder} is not the directory of a T5 text encoder: it has no config.json"
        )
    width = weights["tok_embeddings.weight"].shape[1]
    if not heads and width not in _LLAMAGEN_HEADS:
        raise UserError(f"{gpt} has width {width}, which no published LlamaGen has; give --heads")
    write_safetensors(weights, to / "model.safetensors")
    write_safetensors(tokenizer, to / "vq.safetensors")
    shutil.copytree(
        text_encoder,
        to / "text_encoder",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.bin"),
    )
    config = {
        "model_type": "llamagen",
        "heads": heads or _LLAMAGEN_HEADS[width],
        "image_size": image_size,
    }
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
