"""Say whether a checkpoint is sound: `isic doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import torch

from isic_ray.codebook import table_digest
from isic_ray.config.run import ModelConfig
from isic_ray.models.base import Judge, UnifiedModel
from isic_ray.models.checkpoints import check_index, read_headers, resolve_dtype
from isic_ray.models.fetching import resolve_checkpoint
from isic_ray.models.registry import adapter_of, find_family, load_generator_and_judge

_QUESTION = "Is there a dog in the picture?"
_INSTRUCTION = "Repeat: {prompt}"


def examine(config: ModelConfig, judge: str = "", load: bool = True) -> Iterator[tuple[str, str]]:
    """Yield (what was looked at, what was found), from the files to a model that draws and judges.

    ``judge`` is the checkpoint of judge.model, "" for none. Without ``load`` only files are read,
    and of them only headers and the codebook. Raises UserError at the first problem.
    """
    family = find_family(config)
    directory = resolve_checkpoint(config.name)
    yield "family", f"{family.name} at {directory}"
    adapter = adapter_of(family)
    files = adapter.files(directory)
    check_index(directory)
    shapes = [shape for shape, _ in read_headers(files).values()]
    size = sum(file.stat().st_size for file in files)
    yield "weights", f"{len(shapes):,} tensors in {len(files)} files, {_bytes(size)} on disk"
    spec = adapter.spec(config.name)
    rows, width = spec.codebook.shape
    kind = "normalised rows" if spec.normalised else "rows as they are"
    yield "codebook", f"[{rows:,}, {width}], {kind}, table {table_digest(spec.codebook)[:12]}"
    needed = sum(map(prod, shapes)) * resolve_dtype(config.dtype).itemsize
    yield "memory", f"about {_bytes(needed)} for the weights in {config.dtype}"
    if not load:
        return
    model, loaded_judge = load_generator_and_judge(config, judge)
    yield "loads", f"{model.tokens_per_image:,} tokens a picture"
    tokens = _random_tokens(model)
    pictures = model.decode(tokens)
    yield "pictures", _read_back(model, tokens, pictures)
    if family.judges or judge:
        yield from _judged(loaded_judge, pictures)
    else:
        yield "judge", f"none: a {model.family} model only draws, so a run needs judge.model"


def _random_tokens(model: UnifiedModel) -> torch.Tensor:
    """Return the tokens int32 ``[2,N]`` of two pictures, always the same ones."""
    return torch.randint(
        len(model.codebook),
        (2, model.tokens_per_image),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.int32,
    )


def _read_back(model: UnifiedModel, tokens: torch.Tensor, pictures: np.ndarray) -> str:
    """Return the size of the pictures, and how well the model's encoder reads them back."""
    height, width = pictures.shape[1:3]
    again = model.encode(pictures)
    same = float((again == tokens).float().mean())
    error = np.square(model.decode(again).astype(np.float32) - pictures).mean()
    psnr = 10 * np.log10(255**2 / max(float(error), 1e-3))
    return (
        f"{height} x {width}; random tokens read back: {same:.0%} the same, "
        f"redrawn at {psnr:.1f} dB"
    )


def _judged(judge: Judge, pictures: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield what a judge says about pictures of noise, and how it rewrites a prompt."""
    scores = judge.judge(pictures, [_QUESTION])
    lowest, highest = float(scores.min()), float(scores.max())
    yield "judge", f"P(yes) {lowest:.3f} to {highest:.3f} for noise and {_QUESTION!r}"
    answer = judge.rewrite(["a red apple"], _INSTRUCTION)[0]
    yield "rewriter", f"answers {answer[:60]!r}"


def _bytes(count: float) -> str:
    """Return a number of bytes in the unit that people read."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
