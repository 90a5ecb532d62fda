"""Is a checkpoint sound? `examine` yields what it finds in order, and raises UserError at the
first problem.
"""

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

_QUESTION, _INSTRUCTION = "Is there a dog in the picture?", "Repeat: {prompt}"


def examine(config: ModelConfig, judge: str = "", load: bool = True) -> Iterator[tuple[str, str]]:
    """(what was looked at, what was found), from the files to a loaded model that draws, reads and
    judges.

    Without ``load`` only files are read, and of them only headers and the codebook. Raises
    UserError.
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
    facts = adapter.facts(config.name)
    rows, width = facts.codebook.shape
    kind = "normalised rows" if facts.normalised else "rows as they are"
    yield "codebook", f"[{rows:,}, {width}], {kind}, table {table_digest(facts.codebook)[:12]}"
    itemsize = torch.empty(0, dtype=resolve_dtype(config.dtype)).element_size()
    yield (
        "memory",
        f"about {_bytes(sum(map(prod, shapes)) * itemsize)} for the weights in {config.dtype}",
    )
    if not load:
        return
    model, reader = load_generator_and_judge(config, judge)
    yield "loads", f"{model.tokens_per_image:,} tokens a picture"
    yield from _use(model, reader if family.judges or judge else None)


def _use(model: UnifiedModel, judge: Judge | None) -> Iterator[tuple[str, str]]:
    tokens = torch.randint(
        len(model.codebook),
        (2, model.tokens_per_image),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.int32,
    )
    pictures = model.decode(tokens)
    height, width = pictures.shape[1:3]
    again = model.encode(pictures)
    same = float((again == tokens).float().mean())
    error = np.square(model.decode(again).astype(np.float32) - pictures).mean()
    psnr = 10 * np.log10(255**2 / max(float(error), 1e-3))
    yield (
        "pictures",
        f"{height} x {width}; random tokens read back: {same:.0%} the same, redrawn at {psnr:.1f} dB",
    )
    if judge:
        scores = judge.judge(pictures, [_QUESTION])
        yield (
            "judge",
            f"P(yes) {float(scores.min()):.3f} to {float(scores.max()):.3f} for noise and {_QUESTION!r}",
        )
        answer = judge.rewrite(["a red apple"], _INSTRUCTION)[0]
        yield "rewriter", f"answers {answer[:60]!r}"
    else:
        yield "judge", f"none: a {model.family} model only draws, so a run needs judge.model"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
