"""Exporting a run's best codebook: the checkpoint, the small SafeCodebook file, a model card."""

from __future__ import annotations

from pathlib import Path

from isic_ray.codebook import SafeCodebook
from isic_ray.errors import UserError
from isic_ray.metrics.results import RunResults
from isic_ray.models.registry import load_model
from isic_ray.report.model_card import model_card

ARTIFACT, CARD = "safe_codebook.safetensors", "README.md"


def export_run(uri: str, directory: str) -> str:
    """Write the edited checkpoint of the finished run at ``uri``, and return ``directory``.

    The checkpoint has the layout that it came in; its `SafeCodebook` and its model card lie beside
    it. Raises UserError when the run has not ended, or the directory is not empty.
    """
    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give --to a new or empty directory")
    results = RunResults.open(uri)
    card = model_card(results.summary, results.config, results.evidence)
    blob = results.run.get_blob(results.summary.safe_codebook)
    model = load_model(results.config.model)
    target.mkdir(parents=True, exist_ok=True)
    model.export(SafeCodebook.from_bytes(blob), target)
    (target / ARTIFACT).write_bytes(blob)
    (target / CARD).write_text(card, encoding="utf-8")
    return str(target)
