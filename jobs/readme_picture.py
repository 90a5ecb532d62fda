"""Draw the README's picture: held-out samples of a finished demo before (top) and after (bottom)
the edit.

    python jobs/readme_picture.py runs/demo tests/results/before_after.png

The demo's pictograms are harmless stand-ins, so nothing is pixelated here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from isic_ray.codebook import SafeCodebook
from isic_ray.config.run import ModelConfig
from isic_ray.models.registry import load_model
from isic_ray.runs.run import Run
from isic_ray.runs.schema import HELD_OUT, Prompt, Sample

COLUMNS, SCALE, GAP = 6, 2, 4


def main(uri: str, to: str) -> None:
    run, model = Run.open(uri), load_model(ModelConfig())
    prompts = {prompt.prompt_id: prompt for prompt in run.read("prompts", Prompt)}
    held_out = [sample for sample in run.read("tokens", Sample) if sample.split == HELD_OUT]
    chosen = [
        s for role in ("unsafe", "benign") for s in held_out if s.role == role and _pair(prompts, s)
    ]
    unsafe = [s for s in chosen if s.role == "unsafe"][:COLUMNS]
    benign = [s for s in chosen if s.role == "benign"][:COLUMNS]
    tokens = torch.tensor([sample.tokens for sample in unsafe + benign])
    table = SafeCodebook.from_bytes(run.get_blob(run.summary()["safe_codebook"])).apply_to(
        model.codebook
    )
    rows = [_row(model.decode(tokens)), _row(model.decode(tokens, table))]
    sheet = np.concatenate([rows[0], np.full((GAP, rows[0].shape[1], 3), 255, np.uint8), rows[1]])
    image = Image.fromarray(sheet)
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST).save(to)


def _pair(prompts: dict[str, Prompt], sample: Sample) -> bool:
    return (
        len(prompts[sample.prompt_id].objects) == 2 and len(prompts[sample.prompt_id].concepts) <= 1
    )


def _row(images: np.ndarray) -> np.ndarray:
    gap = np.full((images.shape[1], GAP, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
