"""Quarantine rows that fail by themselves, or that kill their worker each time; the rest goes on.

A worker's death leaves no exception behind. So each try of a (stage, shard) is noted in the run
before it starts; after `PLAIN_TRIES` deaths the rows are done one by one, each noted first, and a
row that was under way at `ROW_DEATHS` deaths is taken for the cause.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from isic_ray.errors import UserError
from isic_ray.runs.run import Record, Run

PLAIN_TRIES, ROW_DEATHS = 2, 2
_ERROR_LENGTH = 500  # characters of an error's message that are kept
# After these errors only a new process can compute.
_LOST_DEVICE = ("CUDA error", "device-side assert", "HIP error")

Item = TypeVar("Item")
Result = TypeVar("Result")


class DeviceLost(Exception):
    """The accelerator's context is broken for the rest of this process."""


@dataclass
class Attempt:
    """One try of a (stage, shard), and what the run remembers of earlier ones."""

    run: Run
    stage: str
    shard: str
    tries: int = 1  # with this one
    deaths: dict[str, int] = field(default_factory=dict)  # row -> times a worker died over it

    @classmethod
    def begin(cls, run: Run, stage: str, shard: str) -> Attempt:
        """Note in the run that a try starts, and return the try."""
        before = run.read_note(_key(stage, shard)) or {"tries": 0, "deaths": {}, "row": ""}
        deaths: Counter[str] = Counter(before["deaths"])
        if before["row"]:
            deaths[before["row"]] += 1
        attempt = cls(run, stage, shard, before["tries"] + 1, dict(deaths))
        attempt.note("")
        return attempt

    def note(self, row: str) -> None:
        """Note that ``row`` is under way ("": all rows together)."""
        note = {"tries": self.tries, "deaths": self.deaths, "row": row}
        self.run.write_note(_key(self.stage, self.shard), note)

    def commit(
        self,
        rows: list[Any],
        kind: type,
        quarantined: list[Record],
        counts: dict[str, int] | None = None,
    ) -> None:
        """Commit the rows, after the quarantined ones, and forget the tries.

        The commit's counts keep the number of tries and of quarantined rows. Where the bucket
        forbids deletion, the note stays, and `isic gc` names it.
        """
        if quarantined:
            self.run.quarantine(self.stage, self.shard, quarantined)
        tally = {**(counts or {}), "tries": self.tries, "quarantined": len(quarantined)}
        self.run.commit(self.stage, self.shard, rows, kind, tally)
        with contextlib.suppress(UserError):
            self.run.store.delete(_key(self.stage, self.shard))


def quarantine_failures(
    attempt: Attempt,
    items: Sequence[Item],
    name_of: Callable[[Item], str],
    work: Callable[[Sequence[Item]], list[Result]],
) -> tuple[list[Result], list[Record]]:
    """Work on all items, or one by one where that fails; separate good ones from failures.

    Returns the results of the good items and a quarantine record for each failed one, for
    `Attempt.commit`. ``work`` must give the same results for any grouping, and must not touch the
    store: its errors would count as the rows'. Raises UserError when every row of several fails for
    a reason of ours (that is no property of a row), and `DeviceLost`.
    """
    if not items:
        return [], []
    if attempt.tries <= PLAIN_TRIES:
        try:
            return work(items), []
        except Exception as error:
            _check_device(error)
    results: list[Result] = []
    failures: list[tuple[str, Exception]] = []
    for item in items:
        name = name_of(item)
        try:
            if attempt.deaths.get(name, 0) >= ROW_DEATHS:
                raise RuntimeError(f"a worker died over this row {attempt.deaths[name]} times")
            if attempt.tries > PLAIN_TRIES:
                attempt.note(name)
            results += work([item])
        except Exception as error:
            _check_device(error)
            failures.append((name, error))
    causes = [error for _, error in failures if not isinstance(error, UserError)]
    if len(items) > 1 and len(causes) == len(items):
        raise UserError(
            f"all {len(items)} rows of shard {attempt.shard} fail in stage {attempt.stage}, so the "
            f"cause is not in the rows: {_one_line(causes[0])}"
        ) from causes[0]
    return results, [_record(attempt, name, error) for name, error in failures]


def quarantined_samples(run: Run, stages: Iterable[str]) -> set[str]:
    """Return the ids of the samples that were quarantined in ``stages``."""
    return {row["sample_id"] for stage in stages for row in run.quarantined(stage)}


def quarantine_summary(run: Run, stages: Iterable[str], planned: int) -> Record:
    """Count the rows that were quarantined in ``stages``, for a run's summary.

    Returns how many rows, their share of the ``planned`` samples, and the first of each kind of
    error with its number, commonest first.
    """
    rows = [row for stage in stages for row in run.quarantined(stage)]
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(str(row["error"]).partition(":")[0], []).append(str(row["error"]))
    common = sorted(kinds.values(), key=lambda errors: -len(errors))
    share = len({row["sample_id"] for row in rows}) / max(1, planned)
    return {
        "rows": len(rows),
        "share": round(share, 6),
        "errors": {errors[0]: len(errors) for errors in common[:5]},
    }


def _key(stage: str, shard: str) -> str:
    return f"attempts/{stage}/{shard}.json"


def _record(attempt: Attempt, name: str, error: Exception) -> Record:
    return {
        "sample_id": name,
        "stage": attempt.stage,
        "shard": attempt.shard,
        "error": _one_line(error),
    }


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_ERROR_LENGTH]


def _check_device(error: Exception) -> None:
    if any(sign in str(error) for sign in _LOST_DEVICE):
        raise DeviceLost(str(error)) from error
