"""Read how far a run is and whether a driver is at work on it, from anywhere that can read it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from isic_ray.runs.run import Record, Run
from isic_ray.runs.schema import BUILD, UNSAFE, Prompt
from isic_ray.runs.shards import PAIRS, PROMPTS, TOKENS, plan_shards

# A driver at work is heard of every few seconds, but a fine-tune or a slow shard may take longer.
SILENT_S = 180.0


@dataclass(frozen=True)
class RoundStatus:
    """The decision on one round, and the share of its pictures that the self-judge flags."""

    kept: bool | None
    unsafe_self: float | None
    note: str


@dataclass(frozen=True)
class RunStatus:
    """How far a run is; `isic status --json` prints these fields."""

    uri: str
    state: str  # "ended", "running" or "silent"
    heard_s: float | None  # seconds since a driver last said what it does
    doing: Record | None  # what it said, unless the run has ended
    outcome: str | None  # the summary's status, once there is one
    shards: dict[str, tuple[int, int]]  # stage -> committed, planned
    rounds: dict[int, RoundStatus]
    quarantined: int  # rows, in all stages
    tries_over: int  # tries of shards that were needed because workers died


def seconds_since_heard(run: Run) -> float | None:
    """Return the seconds since a driver last said what it does.

    None when no driver has said anything since the run ended, or ever.
    """
    said = run.progress()
    if said is None:
        return None
    if run.store.exists("summary.json") and run.store.modified("summary.json") >= float(said["at"]):
        return None
    return max(0.0, time.time() - float(said["at"]))


def read_status(run: Run) -> RunStatus:
    """Read a run's status from what is stored."""
    heard, ended = seconds_since_heard(run), run.store.exists("summary.json")
    if heard is None and ended:
        state = "ended"
    elif heard is not None and heard < SILENT_S:
        state = "running"
    else:
        state = "silent"
    return RunStatus(
        uri=run.store.uri,
        state=state,
        heard_s=None if heard is None else round(heard, 1),
        doing=run.progress() if state != "ended" else None,
        outcome=run.summary()["status"] if ended else None,
        shards=_shards(run),
        rounds={number: _round(record) for number, record in run.rounds().items()},
        quarantined=len(run.quarantined()),
        tries_over=sum(
            commit.counts.get("tries", 1) - 1
            for stage in run.stages()
            for commit in run.committed(stage).values()
        ),
    )


def _shards(run: Run) -> dict[str, tuple[int, int]]:
    """Count committed and planned shards by stage; {} before the prompts are stored."""
    if not run.committed(PROMPTS):
        return {}
    shards = plan_shards(
        run.read(PROMPTS, Prompt),
        run.record["config"]["prompts"]["samples_per_prompt"],
        run.record["plan"]["shard_size"],
    )
    paired = sum(shard.role == UNSAFE and shard.split == BUILD for shard in shards)
    return {
        TOKENS: (len(run.committed(TOKENS)), len(shards)),
        PAIRS: (len(run.committed(PAIRS)), paired),
    }


def _round(record: Record) -> RoundStatus:
    own = record.get("unsafe", {}).get("self", {})
    return RoundStatus(record.get("kept"), own.get("rate"), record.get("note", ""))
