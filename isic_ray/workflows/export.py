"""Exporting a run's best codebook: a checkpoint in the layout it came in, the small SafeCodebook
file, a model card.
"""

from __future__ import annotations

from pathlib import Path

from isic_ray.codebook import SafeCodebook
from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.metrics.results import read_evidence
from isic_ray.models.registry import load_model
from isic_ray.report.model_card import model_card
from isic_ray.runs.run import Run

ARTIFACT, CARD = "safe_codebook.safetensors", "README.md"


def export_run(uri: str, directory: str) -> str:
    """Write the edited checkpoint, its `SafeCodebook` and its model card into ``directory``;
    returns it.

    Raises UserError when the run has not ended, or the directory is not empty.
    """
    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give --to a new or empty directory")
    run = Run.open(uri)
    summary = run.summary()
    blob = run.get_blob(summary["safe_codebook"])
    model = load_model(ModelConfig(**run.record["config"]["model"]))
    target.mkdir(parents=True, exist_ok=True)
    model.export(SafeCodebook.from_bytes(blob), target)
    (target / ARTIFACT).write_bytes(blob)
    card = model_card(summary, run.record["config"], read_evidence(run, summary))
    (target / CARD).write_text(card, encoding="utf-8")
    return str(target)
