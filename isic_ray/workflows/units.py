"""Units of work on a run: what a worker is asked to do, and the commits that it leaves behind.

A unit that was done before is found by its outputs, so that a run that is started again goes on
from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from isic_ray.runs.run import Run
from isic_ray.runs.shards import PAIRS, TOKENS, verdict_stage

Output = tuple[str, str]  # stage and shard of a commit, or folder and file of a blob


class Unit(Protocol):
    """What a worker does at one time."""

    kind: ClassVar[str]
    """In one word, for metrics."""

    @property
    def outputs(self) -> Sequence[Output]:
        """The commits that are there once the unit is done."""
        ...


@dataclass(frozen=True)
class DrawUnit:
    """Draw one shard under the base codebook and judge it; pair it if edits are built from it."""

    kind: ClassVar[str] = "draw"

    shard: str
    base: str
    """Digest of the base codebook."""
    paired: bool = False

    @property
    def outputs(self) -> Sequence[Output]:
        """The shard's samples, verdicts and, if it is paired, pairs."""
        stages = [TOKENS, verdict_stage(self.base), *([PAIRS] if self.paired else [])]
        return [(stage, self.shard) for stage in stages]


@dataclass(frozen=True)
class JudgeUnit:
    """Decode and judge one shard under a codebook."""

    kind: ClassVar[str] = "judge"

    shard: str
    codebook: str
    """Digest of the codebook."""
    reuse_from: str
    """Digest of a codebook whose verdicts hold where pictures are the same under both."""

    @property
    def outputs(self) -> Sequence[Output]:
        """The shard's verdicts."""
        return [(verdict_stage(self.codebook), self.shard)]


AnyUnit = TypeVar("AnyUnit", bound=Unit)


def unfinished(run: Run, units: Iterable[AnyUnit]) -> list[AnyUnit]:
    """Return the units that lack one of their commits, in order."""
    asked = list(units)
    planned: dict[str, list[str]] = {}
    for unit in asked:
        for stage, shard in unit.outputs:
            planned.setdefault(stage, []).append(shard)
    lacking = {
        (stage, shard) for stage, shards in planned.items() for shard in run.pending(stage, shards)
    }
    return [unit for unit in asked if lacking.intersection(unit.outputs)]
