"""A finished run read back: what report, export, comparison, audit and evaluation know of it."""

from __future__ import annotations

import json
from typing import Any

from isic_ray.runs.run import Run

EVIDENCE = "evidence.json"


def read_evidence(run: Run, summary: dict[str, Any]) -> dict[str, Any] | None:
    """The evidence on a run's best codebook; None before `isic evaluate`, or when it is about
    another codebook.
    """
    if not run.store.exists(EVIDENCE):
        return None
    evidence: dict[str, Any] = json.loads(run.store.get(EVIDENCE))
    return (
        evidence
        if evidence.get("codebook") == summary["rounds"][summary["best_round"]]["codebook"]
        else None
    )
