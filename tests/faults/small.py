"""The small run that the fault tests disturb, and what must be equal after any disturbance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from isic_ray.config.run import (
    EditConfig,
    ExecutionConfig,
    FinetuneConfig,
    LoopConfig,
    PromptsConfig,
    RunConfig,
)
from isic_ray.runs.run import Run
from isic_ray.runs.schema import Pair, Sample, Verdict

# Its first round is kept and another follows, so that build pictures are judged again too.
SMALL = RunConfig(
    prompts=PromptsConfig(limit=6),
    edit=EditConfig(min_count=1, min_log_odds=0.5),
    finetune=FinetuneConfig(steps=0, batch_size=4),
    loop=LoopConfig(max_rounds=2, significance=0.9, max_benign_loss=1.0, backoff=0, arms=[]),
    execution=ExecutionConfig(address="local", shard_size=3, batch_size=3),
)
TRAINED = replace(SMALL, finetune=FinetuneConfig(steps=3, batch_size=4))


def essence(run: Run) -> dict[str, Any]:
    """Everything of a run that may not hang on when and how often it was killed: no times, no
    numbers of tries.
    """
    commits = {
        f"{stage}/{shard}": (commit.object, commit.rows)
        for stage in run.stages()
        for shard, commit in run.committed(stage).items()
    }
    summary = {
        key: value for key, value in _timeless(run.summary()).items() if key != "record_sha256"
    }
    return {
        "commits": commits,
        "rounds": {n: _timeless(r) for n, r in run.rounds().items()},
        "summary": summary,
    }


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _timeless(item) for key, item in value.items() if key not in ("seconds", "spent")
        }
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def tries_over(run: Run) -> int:
    """Shards done over, by the commits' own count."""
    return sum(
        c.counts.get("tries", 1) - 1
        for stage in run.stages()
        for c in run.committed(stage).values()
    )


def account(run: Run, whole: Run) -> dict[str, int]:
    """Rows of ``run``, how many of the ``whole`` run's are lost, and how many are there twice."""
    found, expected = list(_names(run)), set(_names(whole))
    return {
        "rows": len(found),
        "lost": len(expected - set(found)),
        "duplicated": len(found) - len(set(found)),
        "shards_done_over": tries_over(run),
    }


def _names(run: Run) -> Iterator[tuple[str, ...]]:
    for stage in run.stages():
        kind = (
            Verdict
            if stage.startswith("verdicts-")
            else {"tokens": Sample, "pairs": Pair}.get(stage)
        )
        for row in run.read(stage, kind) if kind else ():
            yield stage, row.sample_id, getattr(row, "judge", "")
