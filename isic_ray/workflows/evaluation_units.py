"""Units of work of an evaluation, and the names of the stages that they fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from isic_ray.runs.shards import TOKENS, verdict_stage
from isic_ray.workflows.attacks import Budget
from isic_ray.workflows.units import Output


def in_set(stage: str, key: str) -> str:
    """Return the stage of a challenge: ``stage`` itself for the run's own prompts (key "")."""
    return f"{stage}-{key}" if key else stage


def verdicts_in_set(key: str) -> Callable[[str], str]:
    """Return the function that names a challenge's verdict stage by a codebook's digest."""
    return lambda codebook: in_set(verdict_stage(codebook), key)


def fidelity_stage(codebook: str) -> str:
    """Return the stage of `schema.Fidelity` rows under a codebook."""
    return f"fidelity-{codebook[:12]}"


def attack_stage(codebook: str, vary: str, budget: Budget, count: int) -> str:
    """Return the stage of `schema.Attack` rows of a search on a codebook."""
    return f"attack-{vary}-{budget.rounds}x{budget.proposals}-n{count}-{codebook[:12]}"


def recovered_blob(codebook: str, steps: int, pictures: int) -> str:
    """Return the blob that names the table with which a recovery attack on a codebook ends."""
    return f"recovered/{codebook[:12]}-{steps}-{pictures}"


@dataclass(frozen=True)
class DrawSetUnit:
    """Draw one shard of a challenge under the base codebook, and judge it."""

    kind: ClassVar[str] = "draw"

    key: str
    """The challenge's."""
    shard: str
    base: str
    drawn_by: str
    options: Mapping[str, str] = field(default_factory=dict)
    """Of ``drawn_by``, such as the negative prompt."""

    @property
    def outputs(self) -> Sequence[Output]:
        """The shard's samples and verdicts."""
        stages = in_set(TOKENS, self.key), in_set(verdict_stage(self.base), self.key)
        return [(stage, self.shard) for stage in stages]


@dataclass(frozen=True)
class JudgeSetUnit:
    """Judge one shard of a challenge, or of the run's own prompts (key ""), under a codebook."""

    kind: ClassVar[str] = "judge"

    key: str
    shard: str
    codebook: str

    @property
    def outputs(self) -> Sequence[Output]:
        """The shard's verdicts."""
        return [(in_set(verdict_stage(self.codebook), self.key), self.shard)]


@dataclass(frozen=True)
class FidelityUnit:
    """Measure how far the pictures of a benign shard moved under a codebook."""

    kind: ClassVar[str] = "fidelity"

    shard: str
    codebook: str

    @property
    def outputs(self) -> Sequence[Output]:
        """The shard's fidelity rows."""
        return [(fidelity_stage(self.codebook), self.shard)]


@dataclass(frozen=True)
class AttackUnit:
    """Search for unsafe pictures from part ``part`` of ``parts`` of the first ``count`` prompts."""

    kind: ClassVar[str] = "attack"

    vary: str
    """What the search changes: "words" or "seeds"."""
    part: int
    parts: int
    count: int
    budget: Budget
    codebook: str

    @property
    def outputs(self) -> Sequence[Output]:
        """The part's attack rows."""
        stage = attack_stage(self.codebook, self.vary, self.budget, self.count)
        return [(stage, str(self.part))]


@dataclass(frozen=True)
class RecoverUnit:
    """Fine-tune an edited table back with some unsafe pictures."""

    kind: ClassVar[str] = "recover"

    codebook: str
    steps: int
    pictures: int

    @property
    def blob(self) -> str:
        """The blob that names the table with which the attack ends."""
        return recovered_blob(self.codebook, self.steps, self.pictures)

    @property
    def outputs(self) -> Sequence[Output]:
        """That blob."""
        folder, _, file = self.blob.partition("/")
        return [(folder, file)]


EvaluationUnit = DrawSetUnit | JudgeSetUnit | FidelityUnit | AttackUnit | RecoverUnit
