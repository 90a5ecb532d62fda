"""The ISIC loop: `improve` and `try_round` read like the paper's algorithm.

Every step is committed (`isic_ray.workflows.steps`), so that the same call again goes on where the
last one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from isic_ray.codebook import Edit
from isic_ray.config.run import LoopConfig, RunConfig
from isic_ray.execution.pool import RayWorkers
from isic_ray.execution.progress import Progress
from isic_ray.execution.session import check_nodes, ray_session
from isic_ray.execution.training import train_deltas, training_groups
from isic_ray.metrics.statistics import PairedTest, level_for_round, paired_improvement
from isic_ray.metrics.summary import SELF, Round, Summary
from isic_ray.metrics.verdicts import Verdicts
from isic_ray.models.base import ModelSpec
from isic_ray.models.registry import digest_judge, read_spec
from isic_ray.prompts.sets import load_prompts, prompts_digest
from isic_ray.runs.run import Run, fingerprint
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Prompt
from isic_ray.runs.shards import PROMPTS
from isic_ray.workflows.steps import KeptRound, Steps
from isic_ray.workflows.worker import ShardWorker


def run_isic(config: RunConfig, out: str, verbose: bool = False) -> Summary:
    """Run the whole method, or go on with it; artifacts and `summary.json` lie at ``out``.

    Raises UserError for bad input, and when ``out`` holds a run with other settings.
    """
    prompts, spec = load_prompts(config.prompts), read_spec(config.model)
    run = create_run(config, out, prompts, spec)
    progress = Progress(watch=run.write_progress)
    with ray_session(config.execution, verbose):
        check_nodes(run.store.uri)
        with steps_of(config, run, prompts, spec, progress) as steps:
            return improve(config, steps)


def generate(config: RunConfig, out: str, verbose: bool = False) -> Round:
    """Run the first step alone: draw, judge and pair every prompt into the run at ``out``.

    A run or a sweep can go on from what it leaves. Raises UserError as `run_isic` does.
    """
    prompts, spec = load_prompts(config.prompts), read_spec(config.model)
    run = create_run(config, out, prompts, spec)
    with (
        ray_session(config.execution, verbose),
        steps_of(config, run, prompts, spec, Progress()) as steps,
    ):
        return steps.draw_and_judge().round


@contextmanager
def steps_of(
    config: RunConfig, run: Run, prompts: Sequence[Prompt], spec: ModelSpec, progress: Progress
) -> Iterator[Steps]:
    """Give a run's steps workers and trainers of their own, in the current Ray session.

    They are closed at the end; after it the steps can still read what was committed.
    """
    with (
        closing(RayWorkers(ShardWorker, config, run.store.uri)) as workers,
        closing(training_groups(config, run, spec.codebook)) as trainers,
    ):
        train = partial(train_deltas, trainers, config.finetune, run)
        yield Steps(config, run, prompts, spec, workers, train, progress)


def improve(config: RunConfig, steps: Steps) -> Summary:
    """Draw and judge; then edit, fine-tune, re-judge and keep, until no round improves."""
    best = steps.draw_and_judge()
    rounds = [best.round]
    for number in range(1, config.loop.max_rounds + 1):
        attempt = steps.recorded(number, best)
        if attempt is None:
            attempt = steps.commit(try_round(number, best, config, steps))
        rounds.append(attempt)
        if not attempt.kept:
            break
        best = steps.kept(attempt, best)
    arms = steps.arms()
    return steps.summarize(rounds, best, arms)


def try_round(number: int, best: KeptRound, config: RunConfig, steps: Steps) -> Round:
    """Edit, fine-tune, judge held-out pictures and decide.

    A failed try is repeated once with a weaker edit, then the round is rolled back.
    """
    steps.announce(number, best)
    started = time.monotonic()
    base = best.lineage()[0].verdicts
    pairs = steps.pairs_still_flagged(best)
    attempt = Round(number, False, best.codebook, best.verdicts.figures(), pairs=len(pairs))
    if not pairs:
        attempt = replace(attempt, note="the model flags none of its own pictures any more")
    for strength in _strengths(config) if pairs else []:
        edit = steps.edit(replace(config.edit, strength=strength), best.table, pairs)
        table = steps.finetune(edit, best, number)
        if torch.equal(table, best.table):
            attempt = replace(attempt, note="no row passes the thresholds")
            break
        tried = steps.publish(table, number, config.edit.method)
        after = steps.judge_held_out(number, tried, best)
        decision = decide(number, best.verdicts, after, base, config.loop)
        attempt = _with_try(attempt, tried, strength, edit, table, after, decision, steps)
        if decision.kept:
            steps.prepare_next(number, tried, best)
        attempt = replace(attempt, sampled=attempt.sampled + steps.redrawn(tried))
        if decision.kept:
            break
    return _timed(attempt, steps, started)


@dataclass(frozen=True)
class Decision:
    """Whether a round is kept, and why not."""

    kept: bool
    note: str
    test: PairedTest


def decide(
    number: int, before: Verdicts, after: Verdicts, base: Verdicts, limits: LoopConfig
) -> Decision:
    """Keep an edit that the self-judge finds safer on held-out prompts and sparing to benign ones.

    ``before`` are the verdicts under the best codebook so far, ``base`` those before any edit.
    Auditors have no say.
    """
    judged = {sample.sample_id for sample in before.samples}
    unsafe = [s for s in after.select(UNSAFE, HELD_OUT) if s.sample_id in judged]
    benign = after.select(BENIGN, HELD_OUT)
    test = paired_improvement(before.unsafe(SELF, unsafe), after.unsafe(SELF, unsafe))
    tests_per_round = 2 if limits.backoff > 0 else 1
    level = level_for_round(limits.significance, number, limits.max_rounds, tests_per_round)
    aligned = [np.mean(each.shows_what_was_asked(SELF, benign)) for each in (base, after)]
    loss = aligned[0] - aligned[1]
    safer, intact = test.improved(level), bool(loss <= limits.max_benign_loss)
    note = "" if safer else "no significant improvement"
    if not intact:
        note = f"benign alignment falls by {loss:.3f}, more than loop.max_benign_loss"
    return Decision(safer and intact, note, test)


def create_run(
    config: RunConfig,
    out: str,
    prompts: list[Prompt],
    spec: ModelSpec,
    more: dict[str, Any] | None = None,
) -> Run:
    """Create or resume the run at ``out``, with its prompts committed.

    ``more`` goes into its run.json. Raises UserError when ``out`` holds a run with other settings.
    """
    run = Run.create_or_resume(
        out,
        {
            "config": asdict(config),
            "fingerprint": fingerprint(config),
            "model_digest": spec.weights_digest,
            "judge_digest": digest_judge(config.judge.model),
            "prompts_digest": prompts_digest(prompts),
            "plan": {"shard_size": config.execution.shard_size, "prompts": len(prompts)},
            **(more or {}),
        },
    )
    run.commit(PROMPTS, "all", prompts, Prompt)
    return run


def _with_try(
    attempt: Round,
    tried: str,
    strength: float,
    edit: Edit,
    table: torch.Tensor,
    after: Verdicts,
    decision: Decision,
    steps: Steps,
) -> Round:
    """The round's record once a codebook was tried: what it measured, and what was decided."""
    return replace(
        attempt,
        kept=decision.kept,
        codebook=tried if decision.kept else attempt.codebook,
        tried=tried,
        note=decision.note,
        test=decision.test,
        figures=after.figures(),
        strength=strength,
        rank=0 if edit.basis is None else edit.basis.shape[1],
        rows=int((table != steps.spec.codebook).any(1).sum()),
        touched=steps.touched[tried],
    )


def _strengths(config: RunConfig) -> list[float]:
    """The strengths that a round tries, one after the other."""
    first = config.edit.strength
    return [first, first * config.loop.backoff] if config.loop.backoff > 0 else [first]


def _timed(attempt: Round, steps: Steps, started: float) -> Round:
    """The round with its seconds, in all and by stage."""
    own = f"round {attempt.round}: "
    spent = {k.removeprefix(own): round(v, 1) for k, v in steps.spent.items() if k.startswith(own)}
    return replace(attempt, seconds=round(time.monotonic() - started, 1), spent=spent)
