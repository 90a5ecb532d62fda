"""Exporting a run's best codebook: a checkpoint that stock transformers loads, and the small SafeCodebook file."""

from __future__ import annotations

from pathlib import Path

from isic_ray.codebook import SafeCodebook
from isic_ray.config import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.registry import load_model
from isic_ray.runs import Run

ARTIFACT = "safe_codebook.safetensors"


def export_run(uri: str, directory: str) -> str:
    """Write the edited checkpoint and its `SafeCodebook` into ``directory``; returns it.

    Raises UserError when the run has not ended, or the directory is not empty.
    """
    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give --to a new or empty directory")
    run = Run.open(uri)
    blob = run.get_blob(run.summary()["safe_codebook"])
    model = load_model(ModelConfig(**run.record["config"]["model"]))
    SafeCodebook.from_bytes(blob).apply(model.model)  # type: ignore[attr-defined]
    model.model.save_pretrained(target)  # type: ignore[attr-defined]
    model.processor.save_pretrained(target)  # type: ignore[attr-defined]
    (target / ARTIFACT).write_bytes(blob)
    return str(target)
