"""Read checkpoint directories: what their files say, the codebook alone, or the whole model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isic_ray.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPREAD = "spread"  # the model.device that lays layers over several GPUs
_INDEX = "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    """Return the checkpoint's config.json.

    Raises UserError when it is missing or not a JSON object.
    """
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
    """Return ``model_type`` from config.json. Raises UserError when it is not there."""
    model_type = read_config(directory).get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError(
            f"{directory / 'config.json'} names no model_type, so its family is unknown"
        )
    return model_type


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files that transformers loads, by name; a directory may hold others.

    Raises UserError when one is missing or the index is not valid.
    """
    index = directory / _INDEX
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not a valid weight index") from error
    for name in sorted(names):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name} (only safetensors weights are read)")
    return [directory / name for name in sorted(names)]


def check_index(directory: Path) -> None:
    """Raise UserError for the first tensor that the index names and its file does not hold."""
    index = directory / _INDEX
    if not index.is_file():
        return
    held = {path.name: read_headers([path]) for path in weight_files(directory)}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        if name not in held[file]:
            raise UserError(f"{index} says that {file} holds {name}, but it does not")


def digest_files(files: list[Path]) -> str:
    """Return sha256 hex over the bytes of ``files``, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def read_headers(files: list[Path]) -> dict[str, tuple[list[int], str]]:
    """Return shape and dtype of every tensor by name, without reading any.

    Raises UserError for a torn or foreign file.
    """
    found: dict[str, tuple[list[int], str]] = {}
    for path in files:
        with _opened(path) as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                part = weights.get_slice(key)
                found[key] = (list(part.get_shape()), str(part.get_dtype()))
    return found


def read_table(directory: Path, files: list[Path], suffix: str) -> Tensor:
    """Return the codebook float32 ``[K,d]``: the first tensor whose name ends with ``suffix``.

    Its values are those of the file, whatever the precision there. Raises UserError unless there
    is a sound one.
    """
    headers = read_headers(files)
    name = next((name for name in headers if name.endswith(suffix)), None)
    if name is None:
        raise UserError(f"{directory} holds no {suffix}, so there is no codebook to edit")
    what = f"the codebook {name} in {directory}"
    shape, dtype = headers[name]
    if len(shape) != 2:
        raise UserError(f"{what} has shape {shape}, but must be [rows, width]")
    if dtype not in ("F32", "BF16", "F16"):
        raise UserError(f"{what} is {dtype}; it must be F32, BF16 or F16")
    table = _read_tensor(files, name).float()
    if not table.isfinite().all():
        raise UserError(f"{what} holds values that are not finite")
    return table


def resolve_dtype(name: str) -> torch.dtype:
    """Return a dtype by name. Raises UserError for an unknown one."""
    if name not in DTYPES:
        raise UserError(f"model.dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """Return a device by name; "auto" prefers CUDA.

    Raises UserError when it is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == SPREAD:
        raise UserError(
            "model.device: spread serves the emu3 and chameleon families; choose auto, cpu or cuda"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device {name!r} is unknown; choose auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "model.device is cuda but this machine has no CUDA device; choose auto or cpu"
        )
    return device


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hold back the bar that transformers draws per checkpoint, into the middle of our own."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def load_stock(
    kind: Any,
    directory: Path,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    spreads: bool = False,
) -> Any:
    """Load a transformers model of class ``kind``, every weight of which is in the checkpoint.

    ``spreads``: the adapter can use a model whose layers lie on several devices. Raises UserError
    naming the first weight that is missing or has another shape than config.json says.
    """
    read_headers(weight_files(directory))
    to_dtype = resolve_dtype(dtype)
    place = {"device_map": spread_map(kind, directory)} if spreads and device == SPREAD else {}
    to_device = None if place else resolve_device(device)
    try:
        with _no_progress_bar():
            model, info = kind.from_pretrained(
                directory,
                dtype=to_dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                # checked below: transformers' own error names none of them
                ignore_mismatched_sizes=True,
                **place,
            )
    except Exception as error:
        raise UserError(
            f"{directory} could not be loaded as {kind.__name__}: {first_line(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise UserError(f"{directory} lacks {len(missing)} weights, the first is {missing[0]}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{directory}: {name} has shape {list(found)}, but config.json asks for {list(wanted)}"
        )
    return model if to_device is None else model.to(to_device)


def load_processor(kind: Any, directory: Path, trust_remote_code: bool) -> Any:
    """Load a transformers processor of class ``kind``.

    Raises UserError when the checkpoint has no usable one.
    """
    try:
        return kind.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"{directory} has no usable {kind.__name__}: {first_line(error)}"
        ) from error


def spread_map(
    kind: Any, directory: Path, devices: Sequence[int | str] | None = None
) -> dict[str, int | str]:
    """Return transformers' ``device_map`` for class ``kind`` of a checkpoint's config.json.

    Layers go in order and evenly over ``devices`` (None: every GPU); all else, such as embeddings,
    heads, tokenizer and vision tower, to the first. Raises UserError without accelerate, or with
    fewer than two devices.
    """
    devices = list(range(torch.cuda.device_count())) if devices is None else devices
    if find_spec("accelerate") is None:
        raise UserError("model.device: spread needs accelerate; install isic-ray[spread]")
    if len(devices) < 2:
        raise UserError(
            "model.device: spread needs two GPUs or more in each actor, "
            f"which sees {len(devices)}; "
            "raise execution.gpus_per_actor, or set model.device to auto"
        )
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(directory))
    layers = model.get_decoder().layers
    place = {
        layer: devices[index * len(devices) // len(layers)] for index, layer in enumerate(layers)
    }
    return {name: place.get(part, devices[0]) for name, part in _parts(model, set(layers))}


def first_line(error: Any) -> str:
    """Return what an exception says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises UserError when it is torn or foreign."""
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is cut short or is no safetensors file: {first_line(error)}"
        ) from error


def _read_tensor(files: list[Path], name: str) -> Tensor:
    """Return a tensor that one of the files holds."""
    for path in files:
        with _opened(path) as weights:
            if name in weights.keys():  # noqa: SIM118 (not a dict)
                tensor: Tensor = weights.get_tensor(name)
                return tensor
    raise KeyError(name)


def _parts(
    module: nn.Module, layers: set[nn.Module], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers, and the largest modules that hold none of them, by name."""
    for name, child in module.named_children():
        if child in layers or layers.isdisjoint(child.modules()):
            yield path + name, child
        else:
            yield from _parts(child, layers, f"{path}{name}.")
