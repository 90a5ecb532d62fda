"""Describe a run's status to a person: the text that `isic status` prints."""

from __future__ import annotations

from isic_ray.runs.records import Record
from isic_ray.runs.status import RoundStatus, RunStatus


def describe(status: RunStatus) -> str:
    """Return a run's status as lines of text."""
    lines = [f"run         {status.uri}", *_state(status)]
    for stage, (done, planned) in status.shards.items():
        lines.append(f"{stage:11} {done:,} of {planned:,} shards committed")
    for number, found in status.rounds.items():
        lines.append(f"round {number:<5} {_round(number, found)}")
    lines.append(f"quarantine  {status.quarantined:,} rows")
    lines.append(f"done over   {status.tries_over:,} shards, after deaths of workers")
    return "\n".join(lines)


def _state(status: RunStatus) -> list[str]:
    doing = status.doing
    if status.state == "ended":
        return [f"state       ended, {status.outcome}"]
    if doing is None:
        return ["state       silent: not begun, or written by an older version"]
    counts = f", {doing['done']:,} of {doing['total']:,} {doing['unit']}" if doing["total"] else ""
    where = f"{doing['driver']['host']}, process {doing['driver']['pid']}"
    lines = [
        f"state       {status.state}: {doing['stage']}{counts}",
        f"heard of    {status.heard_s:.0f} s ago from {where}",
        *_throughput(doing),
    ]
    if status.state == "silent":
        lines.append(
            "            if nobody is at work on it, the same command again goes on with it"
        )
    return lines


def _throughput(doing: Record) -> list[str]:
    """Return what `execution.progress` counts, if the stage has any throughput."""
    if "pictures_per_s" not in doing:
        return []
    each = f"{doing['pictures_per_s']:.2f} pictures/s, {doing['tokens_per_s']:,.0f} tokens/s"
    actors = f"{doing['actors']} actors, busy {doing['busy_share']:.0%} of the time"
    lines = [f"throughput  {each} from {actors}", f"queue       {doing['waiting']:,} shards wait"]
    if doing["cost"]:
        lines.append(f"cost        {doing['cost']:.2f} in this stage so far")
    return lines


def _round(number: int, found: RoundStatus) -> str:
    kept = "kept" if found.kept else f"not kept, {found.note}"
    if number == 0:
        kept = "before any edit"
    if found.unsafe_self is None:
        return kept
    return f"{kept}, unsafe by the model itself {found.unsafe_self:.1%}"
