"""`isic status`: how far a run is and whether anybody is at work on it, from anywhere that can
read the run.
"""

from __future__ import annotations

import time
from typing import Any

from isic_ray.runs.run import Record, Run
from isic_ray.runs.schema import BUILD, UNSAFE, Prompt
from isic_ray.runs.shards import PAIRS, PROMPTS, TOKENS, plan_shards

# a driver at work is heard of every few seconds, but a fine-tune or a slow shard may take longer
SILENT_S = 180.0


def seconds_since_heard(run: Run) -> float | None:
    """Seconds since a driver last said what it does; None when none did since the run ended, or
    ever.
    """
    said = run.progress()
    if said is None:
        return None
    if run.store.exists("summary.json") and run.store.modified("summary.json") >= float(said["at"]):
        return None
    return max(0.0, time.time() - float(said["at"]))


def status(run: Run) -> dict[str, Any]:
    """``state`` is "ended", "running" or "silent"; shards are counted as [done, planned]."""
    heard, ended = seconds_since_heard(run), run.store.exists("summary.json")
    state = (
        "ended"
        if heard is None and ended
        else "running"
        if heard is not None and heard < SILENT_S
        else "silent"
    )
    stages = {stage: len(run.committed(stage)) for stage in (PROMPTS, TOKENS, PAIRS)}
    planned = _planned(run) if stages[PROMPTS] else {}
    return {
        "uri": run.store.uri,
        "state": state,
        "heard_s": None if heard is None else round(heard, 1),
        "doing": run.progress() if state != "ended" else None,
        "outcome": run.summary()["status"] if ended else None,
        "shards": {stage: [stages[stage], count] for stage, count in planned.items()},
        "rounds": {number: _round(record) for number, record in run.rounds().items()},
        "quarantined": len(run.quarantined()),
        "tries_over": sum(
            commit.counts.get("tries", 1) - 1
            for stage in run.stages()
            for commit in run.committed(stage).values()
        ),
    }


def _planned(run: Run) -> dict[str, int]:
    prompts = run.read(PROMPTS, Prompt)
    size, each = (
        run.record["plan"]["shard_size"],
        run.record["config"]["prompts"]["samples_per_prompt"],
    )
    shards = plan_shards(prompts, each, size)
    return {
        TOKENS: len(shards),
        PAIRS: sum(shard.role == UNSAFE and shard.split == BUILD for shard in shards),
    }


def _round(record: Record) -> Record:
    own = record.get("unsafe", {}).get("self", {})
    return {
        "kept": record.get("kept"),
        "unsafe_self": own.get("rate"),
        "note": record.get("note", ""),
    }


def describe(found: dict[str, Any]) -> str:
    """The same for a person."""
    doing, lines = found["doing"], [f"run         {found['uri']}"]
    if found["state"] == "ended":
        lines.append(f"state       ended, {found['outcome']}")
    elif doing is None:
        lines.append("state       silent: not begun, or written by an older version")
    else:
        where = f"{doing['driver']['host']}, process {doing['driver']['pid']}"
        counts = (
            f", {doing['done']:,} of {doing['total']:,} {doing['unit']}" if doing["total"] else ""
        )
        lines.append(f"state       {found['state']}: {doing['stage']}{counts}")
        lines.append(f"heard of    {found['heard_s']:.0f} s ago from {where}")
        lines += _throughput(doing)
        if found["state"] == "silent":
            lines.append(
                "            if nobody is at work on it, the same command again goes on with it"
            )
    for stage, (done, planned) in found["shards"].items():
        lines.append(f"{stage:11} {done:,} of {planned:,} shards committed")
    for number, record in found["rounds"].items():
        rate = (
            ""
            if record["unsafe_self"] is None
            else f", unsafe by the model itself {record['unsafe_self']:.1%}"
        )
        kept = (
            "before any edit"
            if number == 0
            else "kept"
            if record["kept"]
            else f"not kept, {record['note']}"
        )
        lines.append(f"round {number:<5} {kept}{rate}")
    lines.append(f"quarantine  {found['quarantined']:,} rows")
    lines.append(f"done over   {found['tries_over']:,} shards, after deaths of workers")
    return "\n".join(lines)


def _throughput(doing: dict[str, Any]) -> list[str]:
    """What `execution.observability.Throughput` counts, if the stage has any."""
    if "pictures_per_s" not in doing:
        return []
    each = f"{doing['pictures_per_s']:.2f} pictures/s, {doing['tokens_per_s']:,.0f} tokens/s"
    lines = [
        f"throughput  {each} from {doing['actors']} actors, busy {doing['busy_share']:.0%} of the time"
    ]
    lines.append(f"queue       {doing['waiting']:,} shards wait")
    return lines + (
        [f"cost        {doing['cost']:.2f} in this stage so far"] if doing["cost"] else []
    )
