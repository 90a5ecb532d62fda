"""`isic retrain`: retrain a codebook in the harmless space on pictures."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load, save

from isic_ray.codebook import ArtifactMeta, SafeCodebook, build_edit, table_digest
from isic_ray.config.retrain import RetrainConfig
from isic_ray.config.run import EditConfig, ExecutionConfig, ModelConfig
from isic_ray.errors import UserError
from isic_ray.execution.pictures import find_pictures, stream
from isic_ray.execution.retrain_log import RetrainLog
from isic_ray.execution.retraining import CHECKPOINT, Retraining, fit, picture_size
from isic_ray.execution.session import ray_session
from isic_ray.metrics.results import RunResults
from isic_ray.models.base import ModelSpec
from isic_ray.models.registry import read_spec
from isic_ray.runs.run import Run, fingerprint
from isic_ray.runs.schema import Pair
from isic_ray.runs.shards import codebook_blob

Record = dict[str, Any]

RESULT = "retrain.json"


def retrain(config: RetrainConfig, out: str, verbose: bool = False) -> Record:
    """Train, or go on training, and return the content of `retrain.json`.

    That, the codebook and the metrics lie at ``out``. Raises UserError for bad input, and when
    ``out`` holds another training.
    """
    source = Run.open(config.run)
    model = ModelConfig(**source.record["config"]["model"])
    execution = ExecutionConfig(**source.record["config"]["execution"])
    spec, files = read_spec(model), find_pictures(config.pictures)
    record = {
        "config": asdict(config),
        "fingerprint": fingerprint(config),
        "model_digest": spec.weights_digest,
    }
    run = Run.create_or_resume(out, {**record, "plan": {"files": len(files.train)}})
    with contextlib.suppress(FileNotFoundError):
        return dict(json.loads(run.store.get(RESULT)))
    edited, basis = starting_point(source, spec, config.rank)
    with ray_session(execution, verbose):
        size = picture_size(model, execution, len(source.read("pairs", Pair)[0].safe_tokens))
        held = stream(files.kind, files.evaluate, size).take_batch(config.evaluate)["picture"]
        start = save({"edited": edited, "basis": basis})
        retraining = Retraining(config, model, run.store.uri, start, held)
        fit(retraining, stream(files.kind, files.train, size, config.seed))
    return finish(run, config, spec)


def starting_point(source: Run, spec: ModelSpec, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E′ ``[K,d]``, the codebook of a finished run, and V ``[d,k]``, its harmful space.

    Raises UserError for a run that has not ended, and for pairs that span no such space.
    """
    results = RunResults(source)
    if not source.store.exists("summary.json"):
        raise UserError(
            f"the run at {source.store.uri} has not ended; let it end before retraining."
        )
    edited = results.table(results.best, spec.codebook)
    harmful = torch.tensor([pair.harmful_tokens for pair in results.pairs])
    safe = torch.tensor([pair.safe_tokens for pair in results.pairs])
    edit = build_edit(
        spec.codebook, harmful, safe, safe, EditConfig(method="paper", rank=rank), spec.normalised
    )
    if edit.basis is None:
        raise UserError(
            f"the pairs of {source.store.uri} span no harmful space of rank {rank}; choose another "
            "rank."
        )
    return edited, edit.basis.float().contiguous()


def finish(run: Run, config: RetrainConfig, spec: ModelSpec) -> Record:
    """Publish the trained table as an artifact, and summarize the metrics in `retrain.json`."""
    table = load(run.store.get(CHECKPOINT))["table"]
    digest = table_digest(table)
    artifact = SafeCodebook.from_tables(spec.codebook, table, ArtifactMeta("retrain", spec.family))
    run.put_blob(codebook_blob(digest), artifact.to_bytes())
    rows = RetrainLog.read(run.store)
    evaluated = [row for row in rows if "evaluation_loss" in row]
    result = {
        "schema": 1,
        "safe_codebook": codebook_blob(digest),
        "steps": config.steps,
        "before": evaluated[0],
        "after": evaluated[-1],
        "largest_harmful_component": max(row["harmful_component"] for row in rows),
    }
    run.store.put(RESULT, json.dumps(result, indent=1, allow_nan=False).encode())
    return result
