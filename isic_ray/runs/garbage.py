"""`isic gc`: objects of a run that nothing refers to, left by killed workers and old tries.
Never automatic.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from isic_ray.errors import UserError
from isic_ray.runs.run import Run
from isic_ray.runs.status import seconds_since_heard

LIVE_S = 600.0  # a run that was heard of more lately may be at work
_ROWS = re.compile(r"data/([^/]+)/([^/]+)-[0-9a-f]{64}\.parquet")
_BLOB = re.compile(r"([^/]+)/([^/]+\.safetensors)")
_NOTE = re.compile(r"attempts/([^/]+)/([^/]+)\.json")
_PROBE = re.compile(r"probe-[0-9a-f]{16}")


@dataclass(frozen=True)
class Garbage:
    """An object without use, and its age in seconds."""

    key: str
    age: float


def find_garbage(run: Run, grace_s: float, now: Callable[[], float] = time.time) -> list[Garbage]:
    """Everything that no commit refers to and that is older than ``grace_s``; by key.

    Known are rows, blobs, notes on tries, probes and unfinished local writes; all else is left
    alone.
    """
    found = []
    for key in [*run.store.list(""), *run.store.files.leftovers()]:
        if _is_useless(run, key):
            try:
                found.append(Garbage(key, now() - run.store.files.modified(key)))
            except FileNotFoundError:  # somebody else was faster
                continue
    return sorted((item for item in found if item.age >= grace_s), key=lambda item: item.key)


def collect(run: Run, grace_s: float) -> list[Garbage]:
    """Deletes what `find_garbage` finds; returns it. Raises UserError while the run may be at work.

    A writer could be about to commit an old object that a killed one left. So each object is looked
    up once more, and a run that was heard of in the last ten minutes is refused.
    """
    heard = seconds_since_heard(run)
    if heard is not None and heard < LIVE_S:
        raise UserError(
            f"{run.store.uri} was at work {heard:.0f} s ago; wait until it has ended, or has been silent for "
            f"{LIVE_S / 60:.0f} minutes."
        )
    doomed = [item for item in find_garbage(run, grace_s) if _is_useless(run, item.key)]
    for item in doomed:
        with contextlib.suppress(FileNotFoundError):
            run.store.files.delete(item.key)
    return doomed


def _is_useless(run: Run, key: str) -> bool:
    """Rows and blobs without a commit, notes on shards that have one, probes, unfinished local
    writes; nothing else.
    """
    if key.rpartition("/")[2].startswith(".tmp-") or _PROBE.fullmatch(key):
        return True
    if note := _NOTE.fullmatch(key):
        return run.commit_at(f"commits/{note[1]}/{note[2]}.json") is not None
    if match := _ROWS.fullmatch(key) or _BLOB.fullmatch(key):
        commit = run.commit_at(f"commits/{match[1]}/{match[2]}.json")
        return commit is None or commit.object != key
    return False
