"""From a finished run to its `report/index.html`."""

from __future__ import annotations

from pathlib import Path

from isic_ray.errors import UserError
from isic_ray.metrics.results import RunResults
from isic_ray.models.base import UnifiedModel
from isic_ray.models.registry import load_model
from isic_ray.report.codebook_pictures import explanation_pictures
from isic_ray.report.gallery import pick_gallery
from isic_ray.report.page import build
from isic_ray.runs.records import SEAL

PAGE = "report/index.html"


def write_report(
    uri: str, reveal: bool = False, to: str | None = None, model: UnifiedModel | None = None
) -> str:
    """Write the report of the finished run at ``uri`` and return where it lies.

    ``reveal`` shows flagged pictures as they are, and then needs a path ``to``: the run's own
    report is always pixelated. ``model``: the run's model where it is loaded already. Raises
    UserError for a run that has not ended, or whose results are of another version.
    """
    if reveal and not to:
        raise UserError(
            "--reveal shows flagged pictures; "
            "give --out FILE so that they are not put into the run's report"
        )
    results = RunResults.open(uri)
    model, evidence = model or load_model(results.config.model), results.evidence
    page = build(
        results.summary,
        pick_gallery(results, model),
        facts=_facts(results),
        evidence=evidence,
        pictures=explanation_pictures(results, model) if evidence else (),
        reveal=reveal,
    )
    if to:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).write_text(page, encoding="utf-8")
        return to
    results.run.write_page(PAGE, page)
    return f"{results.run.store.uri.rstrip('/')}/{PAGE}"


def _facts(results: RunResults) -> dict[str, object]:
    """Return what the summary does not say of how the run was made."""
    config = results.config
    return {
        SEAL: results.run.summary()[SEAL],
        "edit": config.edit.method,
        "auditors": ", ".join(config.judge.auditors) or "none",
        "judge threshold": config.judge.threshold,
        "guidance": config.sampling.guidance,
    }
