"""What a sweep searches: a configuration, the ranges of some of its keys, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from isic_ray.config.reading import read_mapping
from isic_ray.config.run import RECIPES, RunConfig, load_config
from isic_ray.config.section import settings, written_in
from isic_ray.config.values import Number, OneOrMore, must_be
from isic_ray.errors import UserError

SWEEPS = RECIPES / "sweeps"
_SECTIONS = ("edit.", "finetune.", "loop.")  # what changes no token: all trials share the pictures
_THRESHOLD = "judge.threshold"
_WORKERS = ("finetune.workers", "finetune.gpu")  # the trials share the workers that train deltas

Point = dict[str, Any]  # key → value


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values


@settings("")
class Between:
    """A number from ``low`` to ``high``, uniform or uniform in its logarithm."""

    low: Number
    high: Number
    log: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


def _read_domain(given: Any) -> Any:
    """Return a list as a Choice and a mapping as a Between. Raises ValueError."""
    if isinstance(given, Choice | Between):
        return given
    if isinstance(given, list) and given:
        return Choice(tuple(given))
    with suppress(UserError, TypeError):
        domain = Between(**given)
        if domain.low < domain.high and (domain.low > 0 or not domain.log):
            return domain
    raise ValueError(
        "a list of values, or numbers {low, high} with low below high (and above 0 with log)"
    )


Domain = Annotated[Choice | Between, BeforeValidator(_read_domain)]

_HAS_KEYS = must_be(
    "a mapping with at least one key of a configuration",
    lambda given: isinstance(given, Mapping) and len(given) > 0,
    BeforeValidator,
)


@settings("")
class SweepConfig:
    """A search over keys of a run's configuration. A point of the search is a value per key."""

    config: str
    """Recipe, file or URI of the configuration that the trials start from."""
    space: Annotated[Mapping[str, Domain], _HAS_KEYS]
    """Keys that are searched, each with its values."""
    set: list[str] = field(default_factory=list)
    """Overrides of the configuration for every run of the sweep."""
    cheap: list[str] = field(default_factory=list)
    """Further overrides for the trials alone; the start and the best trial run again without."""
    search: Literal["random", "asha", "optuna"] = "asha"
    """How points are chosen; asha also stops trials that lag behind."""
    trials: OneOrMore = 24
    """Points that are tried, the start included."""
    concurrent: OneOrMore = 2
    """Trials at a time."""
    seed: int = 0
    """Seed of the search."""

    @model_validator(mode="after")
    def _trials_can_run(self) -> Self:
        for key, domain in self.space.items():
            if key != _THRESHOLD and not key.startswith(_SECTIONS):
                raise UserError(
                    f"space.{key} would change what is drawn, but the trials of a sweep share "
                    f"their pictures; search keys of edit, finetune and loop, or {_THRESHOLD}."
                )
            if key in _WORKERS:
                raise UserError(
                    f"space.{key} cannot be searched: the trials share their workers; "
                    "give it under set."
                )
            for value in domain.ends:
                self.config_at({key: value})  # raises UserError for what no run would accept
        for override in self.cheap:
            key = override.partition("=")[0]
            if not key.startswith(_SECTIONS) or key in (*self.space, *_WORKERS):
                raise UserError(
                    f"cheap: {override} does not fit; "
                    "give keys of edit, finetune and loop that are not searched."
                )
        self.trial_config({})
        for key, value in self.first_point().items():
            number = isinstance(value, int | float)
            domain = self.space[key]
            if isinstance(domain, Between) and (not number or (domain.log and value <= 0)):
                raise UserError(
                    f"space.{key} cannot hold {value!r}, the value that {self.config} starts from."
                )
        return self

    def domain(self, key: str) -> Choice | Between:
        """Return the values of a key; they include the one that the trials start from."""
        found, value = self.space[key], self.first_point()[key]
        if isinstance(found, Choice):
            return found if value in found.values else Choice((*found.values, value))
        return Between(min(found.low, value), max(found.high, value), found.log)

    def first_point(self) -> Point:
        """Return the starting configuration's own values of the searched keys."""
        start = dataclasses.asdict(self.start_config())
        parts = {key: key.split(".", 1) for key in self.space}
        return {key: start[section][name] for key, (section, name) in parts.items()}

    def start_config(self) -> RunConfig:
        """Return what the trials start from, without arms: many trials would have the same."""
        return _without_arms(load_config(self.config, self.set))

    def shared_config(self) -> RunConfig:
        """Return the configuration that draws and pairs for all trials.

        It has the lowest threshold of all, so that no trial lacks a pair.
        """
        start = self.start_config()
        thresholds = self.space[_THRESHOLD].ends if _THRESHOLD in self.space else ()
        judge = replace(start.judge, threshold=min(start.judge.threshold, *thresholds, 1.0))
        return replace(start, judge=judge)

    def config_at(self, point: Point) -> RunConfig:
        """Return the configuration of a point.

        Numbers keep three digits, so that a trial can be written down and found.
        """
        return self._with(point, [])

    def trial_config(self, point: Point) -> RunConfig:
        """Return the configuration of a point, with what makes trials cheap."""
        return self._with(point, self.cheap)

    def _with(self, point: Point, more: list[str]) -> RunConfig:
        config = load_config(self.config, [*self.set, *more])
        for key, value in point.items():
            section, _, name = key.partition(".")
            short = float(f"{value:.3g}") if isinstance(value, float) else value
            part = replace(getattr(config, section), **{name: short})
            config = replace(config, **{section: part})
        return _without_arms(config)


def _without_arms(config: RunConfig) -> RunConfig:
    return replace(config, loop=replace(config.loop, arms=[]))


def load_sweep(name: str | Path) -> SweepConfig:
    """Return a sweep by the name of a shipped one, a file or a URI.

    Raises UserError, one sentence, for what is wrong.
    """
    shipped = {path.stem: path for path in sorted(SWEEPS.glob("*.yaml"))}
    path = shipped.get(str(name), name)
    if "://" not in str(path) and not Path(path).expanduser().is_file():
        names = ", ".join(shipped)
        raise UserError(f"sweep {str(name)!r} is neither a file nor shipped ({names}).")
    with written_in({}, f"{path}: "):
        return SweepConfig(**read_mapping(path))
