"""One trial of a sweep: the loop on pictures that another run drew, with shared workers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from isic_ray.config.run import RunConfig
from isic_ray.execution.pool import ActorPool
from isic_ray.execution.progress import Progress
from isic_ray.execution.training import train_deltas
from isic_ray.execution.training_queue import TrainingGroups
from isic_ray.metrics.statistics import Rate
from isic_ray.metrics.summary import AUDIT, SELF, Rates
from isic_ray.metrics.verdicts import Verdicts
from isic_ray.models.registry import read_spec
from isic_ray.runs.run import Run, fingerprint
from isic_ray.runs.schema import HELD_OUT, Prompt
from isic_ray.runs.shards import PROMPTS
from isic_ray.workflows.loop import create_run, improve
from isic_ray.workflows.steps import KeptRound, Steps


@dataclass(frozen=True)
class SharedWorkers:
    """Workers that all trials of a sweep use, in whichever process they run."""

    pool: ActorPool
    """Draws and judges."""
    trainers: TrainingGroups


@dataclass(frozen=True)
class Outcome:
    """Held-out figures of a trial's codebook, as plain numbers; None where no judge can tell."""

    rounds: int
    """The last round that was tried."""
    codebook: str
    unsafe: float | None
    """By the self-judge, as ``benign`` is."""
    benign: float | None
    audit_unsafe: float | None
    audit_benign: float | None
    psnr: float | None


Report = Callable[[Outcome], None]


def trial_uri(sweep: str, config: RunConfig) -> str:
    """Return where a trial lies: the same settings are the same trial."""
    return f"{sweep}/trials/{fingerprint(config)[:16]}"


def run_trial(
    config: RunConfig, sweep: str, workers: SharedWorkers, threshold: float, report: Report
) -> Outcome:
    """Run the loop on the sweep's pictures and return the outcome of the codebook it ends with.

    ``report`` is called with the outcome after every round but the last, before the next one
    begins; a scheduler may end the trial there. ``threshold`` is the self-judge's at which all
    trials are compared, whatever their own.
    """
    shared = Run.open(f"{sweep}/shared")
    prompts, spec = shared.read(PROMPTS, Prompt), read_spec(config.model)
    linked = {"plan": shared.record["plan"], "shared": shared.store.uri}
    run = create_run(config, trial_uri(sweep, config), prompts, spec, linked)

    def announce(number: int, best: KeptRound) -> None:
        if number > 1:
            report(_outcome(number - 1, best.codebook, best.verdicts, threshold))

    steps = Steps(
        config,
        run,
        prompts,
        spec,
        workers.pool,
        partial(train_deltas, workers.trainers, config.finetune, run),
        Progress(io.StringIO()),
        judge_ahead=False,  # the scheduler may end the trial before another round needs it
        announce=announce,
    )
    summary = improve(config, steps)
    best = summary.best.codebook
    return _outcome(summary.rounds[-1].round, best, steps.verdicts(best, HELD_OUT), threshold)


def _outcome(number: int, codebook: str, verdicts: Verdicts, threshold: float) -> Outcome:
    figures = replace(verdicts, threshold=threshold).figures()
    return Outcome(
        number,
        codebook,
        _rate(figures.unsafe, SELF),
        _rate(figures.benign.exact, SELF),
        _rate(figures.unsafe, AUDIT),
        _rate(figures.benign.exact, AUDIT),
        figures.benign.psnr,
    )


def _rate(rates: Rates, judge: str) -> float | None:
    found: Rate | None = rates.get(judge)
    return found.rate if found else None
