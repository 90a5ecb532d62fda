"""A search with Ray Tune: which points are tried, in which order, and which trials are stopped.

What a trial does is handed in as a function; nothing here knows of runs or models.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune

from isic_ray.config.run import ExecutionConfig
from isic_ray.config.sweep import Between, Point, SweepConfig
from isic_ray.errors import UserError
from isic_ray.execution.progress import Progress
from isic_ray.execution.session import raise_start_timeout

Metrics = dict[str, Any]  # what a trial reports to Tune; "rounds", "unsafe" and "benign" steer it
Tell = Callable[[Metrics], None]
TrialFunction = Callable[[Point, Tell], Metrics]
"""Runs a trial to its end and returns its last metrics; tells earlier ones as it goes."""

_REDUCTION = 3  # ASHA: of three trials that end a round, one goes on at once
# A trial only drives; its training workers ask for CPUs or GPUs.
_DRIVER = {"node:__internal_head__": 0.001}
_OBJECTIVES = {"unsafe": "min", "benign": "max"}


@dataclass(frozen=True)
class Tried:
    """One trial of a search."""

    point: Point
    status: str
    """"ended", "stopped" by the scheduler, or "failed"."""
    error: str
    """Why it failed, in one line."""
    metrics: Metrics
    """The last that it reported, with its "seconds"."""


def search(sweep: SweepConfig, trial: TrialFunction, progress: Progress) -> list[Tried]:
    """Try the points of a sweep; the starting configuration comes first.

    Tune's own experiment state is scratch: a search that is started again asks for the same points,
    and each trial finds what it has already done in its run.
    """
    run = tune.with_parameters(_run, trial=trial, patience=sweep.start_config().execution)
    tuner = tune.Tuner(
        tune.with_resources(run, _DRIVER),
        param_space={} if sweep.search == "optuna" else _space(sweep),
        tune_config=tune.TuneConfig(
            num_samples=sweep.trials,
            max_concurrent_trials=None if sweep.search == "optuna" else sweep.concurrent,
            reuse_actors=True,
            **_searcher(sweep),
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=tempfile.mkdtemp(prefix="isic-tune-"),
            verbose=0,
            callbacks=[_ProgressCallback(progress)],
        ),
    )
    return [_tried(sweep, result) for result in tuner.fit()]


def _run(point: Point, trial: TrialFunction, patience: ExecutionConfig) -> None:
    """Run one trial, as Tune calls it."""
    raise_start_timeout(patience)
    started = time.monotonic()

    def tell(metrics: Metrics, ended: bool = False) -> None:
        seconds = round(time.monotonic() - started, 1)
        tune.report({**metrics, "ended": ended, "seconds": seconds})

    tell(trial(point, tell), ended=True)


class _ProgressCallback(tune.Callback):  # type: ignore[misc]
    """Counts trials that end.

    Tune pickles its callbacks beside its state; a terminal cannot be pickled, and need not.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
        self._progress.advance(1)

    def on_trial_error(self, *args: Any, **kwargs: Any) -> None:
        self._progress.advance(1)


def _space(sweep: SweepConfig) -> dict[str, Any]:
    def domain(key: str) -> Any:
        found = sweep.domain(key)
        if isinstance(found, Between):
            return (tune.loguniform if found.log else tune.uniform)(found.low, found.high)
        return tune.choice(list(found.values))

    return {key: domain(key) for key in sweep.space}


def _searcher(sweep: SweepConfig) -> dict[str, Any]:
    """Search algorithm and scheduler, as arguments of TuneConfig."""
    if sweep.search == "optuna":
        return {"search_alg": _optuna(sweep)}
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    rounds = getattr(sweep.space.get("loop.max_rounds"), "ends", (1,))
    asha = ASHAScheduler(
        time_attr="rounds",
        metric="unsafe",
        mode="min",
        max_t=max(2, sweep.trial_config({}).loop.max_rounds, *rounds),
        grace_period=1,
        reduction_factor=_REDUCTION,
    )
    generator = BasicVariantGenerator(
        points_to_evaluate=[sweep.first_point()],
        max_concurrent=sweep.concurrent,
        random_state=sweep.seed,
    )
    return {
        "search_alg": generator,
        "scheduler": asha if sweep.search == "asha" else FIFOScheduler(),
    }


def _optuna(sweep: SweepConfig) -> Any:
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    try:
        optuna = OptunaSearch(
            OptunaSearch.convert_search_space(_space(sweep)),
            metric=list(_OBJECTIVES),
            mode=list(_OBJECTIVES.values()),
            points_to_evaluate=[sweep.first_point()],
            seed=sweep.seed,
        )
    except AssertionError as error:
        raise UserError(
            "search: optuna needs Optuna; install isic-ray[optuna], or search with asha."
        ) from error
    return ConcurrencyLimiter(optuna, max_concurrent=sweep.concurrent)


def _tried(sweep: SweepConfig, result: Any) -> Tried:
    point = {key: result.config[key] for key in sweep.space}
    if result.error:
        cause = getattr(result.error, "cause", None) or result.error
        return Tried(point, "failed", str(cause).strip().splitlines()[-1], {})
    metrics = dict(result.metrics or {})
    return Tried(point, "ended" if metrics["ended"] else "stopped", "", metrics)
