"""From a `ModelConfig` to a loaded model: finds the checkpoint, chooses the adapter, refuses what cannot work."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from isic_ray.config import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import ModelFacts, UnifiedModel

FAMILIES = ("janus",)
_REFUSED = {
    "showo": "its tokenizer quantises by sign (lookup-free), so there is no codebook table to edit",
    "bagel": "it draws by diffusion in a continuous latent space, so there is no codebook to edit",
    "infinity": "its tokenizer is bitwise (BSQ), so there is no codebook table to edit",
    "glmimage": "a diffusion decoder draws from its token ids, so there is no codebook table to edit",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def load_model(config: ModelConfig) -> UnifiedModel:
    """The model that ``config`` names, ready to draw. Raises UserError with the reason when it cannot be used."""
    family = config.family
    if family == "auto":
        _refuse(config.name.rsplit("/", 1)[-1], config.name)  # before fetching gigabytes
        family = read_model_type(resolve_checkpoint(config.name))
    _refuse(family, config.name)
    if family not in FAMILIES:
        raise UserError(f"model {config.name!r} is of family {family!r}; known families: {', '.join(FAMILIES)}")
    from isic_ray.models.janus import JanusModel  # adapters are heavy: import the one that is used

    return JanusModel.from_pretrained(config.name, config.dtype, config.device, config.trust_remote_code)


def read_facts(config: ModelConfig) -> ModelFacts:
    """Digest and codebook of the model that ``config`` names, read without loading it. Raises UserError."""
    family = config.family if config.family != "auto" else read_model_type(resolve_checkpoint(config.name))
    _refuse(family, config.name)
    if family not in FAMILIES:
        raise UserError(f"model {config.name!r} is of family {family!r}; known families: {', '.join(FAMILIES)}")
    from isic_ray.models.janus import JanusModel

    return JanusModel.facts(config.name)


def _refuse(family: str, name: str) -> None:
    plain = re.sub(r"[^a-z]", "", family.lower())
    for refused, reason in _REFUSED.items():
        if plain.startswith(refused):
            raise UserError(f"model {name!r} cannot be edited: {reason}")


def resolve_checkpoint(name: str) -> Path:
    """The directory of "pictogram", of a path, or of a hub name (fetched). Raises UserError when there is none."""
    if name == "pictogram":
        from isic_ray.models.pictogram.checkpoint import WEIGHTS

        if not WEIGHTS.is_dir():
            raise UserError(f"the embedded model's weights are missing from {WEIGHTS}; reinstall isic_ray")
        return WEIGHTS
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"model {name!r} is a file; give the checkpoint's directory")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"model {name!r} is neither a directory nor a hub name of the form owner/model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model {name!r} is no directory here, and the hub did not give it: {reason}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's config.json. Raises UserError when it is missing or not a JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is not a checkpoint: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    return config


def read_model_type(directory: Path) -> str:
    """``model_type`` from config.json. Raises UserError when the checkpoint does not name one."""
    model_type = read_config(directory).get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError(f"{directory / 'config.json'} names no model_type, so its family is unknown")
    return model_type


def weight_files(directory: Path) -> list[Path]:
    """The weight files that transformers loads, by name; a directory may hold others. Raises UserError."""
    index = directory / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is not a valid weight index") from error
    for name in sorted(names):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name} (only safetensors weights are read)")
    return [directory / name for name in sorted(names)]


def digest_files(files: list[Path]) -> str:
    """sha256 hex over the bytes of ``files``, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def resolve_dtype(name: str) -> torch.dtype:
    """A dtype by name. Raises UserError for an unknown one."""
    if name not in _DTYPES:
        raise UserError(f"model.dtype {name!r} is unknown; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """A device by name; "auto" prefers CUDA. Raises UserError when it is unknown or not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device {name!r} is unknown; choose auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is cuda but this machine has no CUDA device; choose auto or cpu")
    return device
