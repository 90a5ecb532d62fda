"""Find and delete objects of a run that nothing refers to, left by killed workers and old tries.

This is `isic gc`; it never happens by itself.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass

from isic_ray.errors import UserError
from isic_ray.runs.filesystems import TEMPORARY
from isic_ray.runs.run import Run
from isic_ray.runs.status import seconds_since_heard

LIVE_S = 600.0  # a run whose driver was heard of more recently may be at work
_ROWS = re.compile(r"data/([^/]+)/([^/]+)-[0-9a-f]{64}\.parquet")
_BLOB = re.compile(r"([^/]+)/([^/]+\.safetensors)")
_NOTE = re.compile(r"attempts/([^/]+)/([^/]+)\.json")
_PROBE = re.compile(r"probe-[0-9a-f]{16}")


@dataclass(frozen=True)
class Garbage:
    """An object without use, and its age in seconds."""

    key: str
    age: float


def find_garbage(run: Run, grace_s: float) -> list[Garbage]:
    """Return everything that no commit refers to and that is older than ``grace_s``, by key.

    It knows rows, blobs, notes on tries, probes and unfinished local writes, and leaves all other
    objects alone.
    """
    found = []
    for key in [*run.store.list(""), *run.store.files.leftovers()]:
        if _is_useless(run, key):
            # The object may be gone by now, if another process deleted it.
            with contextlib.suppress(FileNotFoundError):
                found.append(Garbage(key, time.time() - run.store.files.modified(key)))
    return sorted((item for item in found if item.age >= grace_s), key=lambda item: item.key)


def collect(run: Run, grace_s: float) -> list[Garbage]:
    """Delete what `find_garbage` finds, and return it.

    A writer could be about to commit an old object that a killed one left. So each object is looked
    up once more, and a run whose driver was heard of in the last ten minutes is refused with a
    UserError.
    """
    heard = seconds_since_heard(run)
    if heard is not None and heard < LIVE_S:
        raise UserError(
            f"{run.store.uri} was at work {heard:.0f} s ago; wait until it has ended, or has been "
            f"silent for {LIVE_S / 60:.0f} minutes."
        )
    doomed = [item for item in find_garbage(run, grace_s) if _is_useless(run, item.key)]
    for item in doomed:
        with contextlib.suppress(FileNotFoundError):
            run.store.files.delete(item.key)
    return doomed


def _is_useless(run: Run, key: str) -> bool:
    """Return whether nothing can need the object any more.

    That holds for rows and blobs without a commit, notes on shards that have one, probes, and
    unfinished local writes.
    """
    if key.rpartition("/")[2].startswith(TEMPORARY) or _PROBE.fullmatch(key):
        return True
    if note := _NOTE.fullmatch(key):
        return run.commit_at(f"commits/{note[1]}/{note[2]}.json") is not None
    if match := _ROWS.fullmatch(key) or _BLOB.fullmatch(key):
        commit = run.commit_at(f"commits/{match[1]}/{match[2]}.json")
        return commit is None or commit.object != key
    return False
