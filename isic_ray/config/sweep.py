"""What a sweep searches: a configuration, the ranges of some of its keys, and how. Read from
YAML, as recipes are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from isic_ray.config import reading as check
from isic_ray.config.run import RECIPES, RunConfig, load_config
from isic_ray.errors import UserError

SWEEPS = RECIPES / "sweeps"
SEARCHES = ("random", "asha", "optuna")
_SECTIONS = ("edit.", "finetune.", "loop.")  # what changes no token: all trials share the pictures
_THRESHOLD = "judge.threshold"
_WHERE = (
    "finetune.workers",
    "finetune.gpu",
)  # where deltas are trained: the trials share those workers

Point = dict[str, Any]  # key → value


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values


@dataclass(frozen=True)
class Between:
    """A number from ``low`` to ``high``, uniform or uniform in its logarithm."""

    low: float
    high: float
    log: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


@dataclass(frozen=True)
class SweepConfig:
    """A search space over the keys of a run's configuration, which is a recipe, a file or a URI
    plus overrides.

    ``cheap`` are further overrides for the trials alone: the best of them and the start then run
    again without.
    """

    config: str
    space: Mapping[str, Choice | Between]
    set: list[str] = field(default_factory=list)
    cheap: list[str] = field(default_factory=list)
    search: str = "asha"
    trials: int = 24
    concurrent: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check.choice("search", self.search, SEARCHES)
        check.least("trials", self.trials, 1)
        check.least("concurrent", self.concurrent, 1)
        check.that(
            bool(self.space),
            "space",
            dict(self.space),
            "a mapping with at least one key of a configuration",
        )
        for key, domain in self.space.items():
            if key != _THRESHOLD and not key.startswith(_SECTIONS):
                raise UserError(
                    f"space.{key} would change what is drawn, but the trials of a sweep share their pictures; "
                    f"search keys of edit, finetune and loop, or {_THRESHOLD}."
                )
            if key in _WHERE:
                raise UserError(
                    f"space.{key} cannot be searched: the trials share their workers; give it under set."
                )
            for value in domain.ends:
                self.at({key: value})  # raises UserError for what no run would accept
        for override in self.cheap:
            if not override.startswith(_SECTIONS) or override.partition("=")[0] in (
                *self.space,
                *_WHERE,
            ):
                raise UserError(
                    f"cheap: {override} does not fit; give keys of edit, finetune and loop that are not searched."
                )
        self.trial({})
        for key, value in self.first().items():
            domain = self.space[key]
            if isinstance(domain, Between) and (
                not isinstance(value, int | float) or (domain.log and value <= 0)
            ):
                raise UserError(
                    f"space.{key} cannot hold {value!r}, the value that {self.config} starts from."
                )

    def domain(self, key: str) -> Choice | Between:
        """The values of a key; they always include the one that the trials start from."""
        found, value = self.space[key], self.first()[key]
        if isinstance(found, Choice):
            return found if value in found.values else Choice((*found.values, value))
        return Between(min(found.low, value), max(found.high, value), found.log)

    def start(self) -> RunConfig:
        """What the trials start from; without arms, which would be the same for many of them."""
        config = load_config(self.config, self.set)
        return replace(config, loop=replace(config.loop, arms=[]))

    def shared(self) -> RunConfig:
        """The configuration that draws and pairs for all: with the lowest threshold, so that no
        trial lacks a pair.
        """
        start = self.start()
        thresholds = self.space[_THRESHOLD].ends if _THRESHOLD in self.space else ()
        judge = replace(start.judge, threshold=min(start.judge.threshold, *thresholds, 1.0))
        return replace(start, judge=judge)

    def first(self) -> Point:
        """The starting configuration's own values of the searched keys."""
        start = dataclasses.asdict(self.start())
        return {key: start[key.partition(".")[0]][key.partition(".")[2]] for key in self.space}

    def at(self, point: Point) -> RunConfig:
        """The configuration of a point. Numbers keep three digits, so that a trial can be
        written down and found.
        """
        return self._with(point, [])

    def trial(self, point: Point) -> RunConfig:
        """`at` with what makes trials cheap."""
        return self._with(point, self.cheap)

    def _with(self, point: Point, more: list[str]) -> RunConfig:
        values = {
            key: float(f"{value:.3g}") if isinstance(value, float) else value
            for key, value in point.items()
        }
        overrides = [f"{key}={check.to_scalar(value)}" for key, value in values.items()]
        config = load_config(self.config, [*self.set, *more, *overrides])
        return replace(config, loop=replace(config.loop, arms=[]))


def load_sweep(name: str | Path) -> SweepConfig:
    """A sweep by the name of a shipped one, a file or a URI. Raises UserError, one sentence, for
    what is wrong.
    """
    shipped = {path.stem: path for path in sorted(SWEEPS.glob("*.yaml"))}
    path = shipped.get(str(name), name)
    if "://" not in str(path) and not Path(path).expanduser().is_file():
        raise UserError(
            f"sweep {str(name)!r} is neither a file nor shipped ({', '.join(shipped)})."
        )
    tree = check.read_mapping(path)
    types = {f.name: str(f.type) for f in dataclasses.fields(SweepConfig)}
    for key in tree:
        if key not in types:
            raise UserError(
                f"{path}: unknown key {key}; did you mean {check.closest(key, list(types))}?"
            )
    for key in ("config", "space"):
        if key not in tree:
            raise UserError(
                f"{path}: {key} is missing; see the shipped sweeps ({', '.join(shipped)})."
            )
    values = {
        key: check.typed(key, types[key], tree[key], f"{path}: ") for key in tree if key != "space"
    }
    space = tree["space"]
    if not isinstance(space, dict):
        raise UserError(f"{path}: space must map keys of a configuration to their values.")
    return SweepConfig(
        **values,
        space={str(key): _domain(f"{path}: space.{key}", given) for key, given in space.items()},
    )


def _domain(where: str, given: Any) -> Choice | Between:
    if isinstance(given, list) and given:
        return Choice(tuple(given))
    if isinstance(given, dict) and {"low", "high"} <= set(given) <= {"low", "high", "log"}:
        low, high = (check.typed(f"{where}.{end}", "float", given[end]) for end in ("low", "high"))
        log = check.typed(f"{where}.log", "bool", given.get("log", False))
        if low < high and (low > 0 or not log):
            return Between(low, high, log)
    raise UserError(
        f"{where} must be a list of values, or {{low, high}} with low below high (and above 0 with log)."
    )
