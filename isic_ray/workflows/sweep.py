"""`isic sweep`: Ray Tune over the method's settings. Every trial is a run on the same pictures,
resumable like any.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import tune

from isic_ray.config.describe import to_yaml
from isic_ray.config.run import RunConfig, load_config
from isic_ray.config.sweep import Between, Point, SweepConfig
from isic_ray.errors import UserError
from isic_ray.execution.pool import start_pool
from isic_ray.execution.progress import Progress
from isic_ray.execution.session import raise_start_timeout, ray_session
from isic_ray.execution.training import training_groups
from isic_ray.metrics import statistics
from isic_ray.metrics.verdicts import SELF
from isic_ray.models.base import ModelSpec
from isic_ray.models.registry import read_spec
from isic_ray.prompts.sets import load_prompts
from isic_ray.report.sweep import mark_front, pareto_svg
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Prompt
from isic_ray.runs.shards import codebook_blob
from isic_ray.runs.store import Store
from isic_ray.workflows.loop import IsicLoop, create_run
from isic_ray.workflows.steps import Record
from isic_ray.workflows.trial import Trial, Workers

_REDUCTION = 3  # ASHA: of three trials that end a round, one goes on at once
_DRIVER = {
    "node:__internal_head__": 0.001
}  # a trial only drives; its training workers ask for CPUs or GPUs
_OBJECTIVES = {"unsafe": "min", "benign": "max"}


def run_sweep(sweep: SweepConfig, out: str, verbose: bool = False) -> Record:
    """Search, or go on with a search that was stopped. Leaves `sweep.json`, `best.yaml` and
    `pareto.svg` at ``out``.

    Half of the held-out prompts compare the trials; the other half is kept for one last test of the
    chosen point against the starting configuration. Raises UserError when no trial succeeds.
    """
    started, store, shared = time.monotonic(), Store.open(out), sweep.shared_config()
    out = store.uri
    chosen, fresh = split_held_out(load_prompts(shared.prompts))
    progress = Progress()
    with ray_session(shared.execution, verbose):
        facts = read_spec(shared.model)
        run = create_run(shared, f"{out}/shared", chosen, facts)
        loop = IsicLoop(shared, run, chosen, facts, progress)
        loop.crew = crew = start_pool(
            shared, run.store.uri
        )  # trials share it, so it outlives the drawing
        loop.generate()
        with training_groups(
            shared, run, facts.codebook, kept=True, count=sweep.concurrent
        ) as trainers:
            trainers.start()
            workers = crew, trainers
            progress.start("trials", sweep.trials, "trials")
            trials = search(sweep, out, workers, progress)
            progress.finish()
            finals = run_finals(sweep, out, workers, trials, progress)
        crew.close()  # the last test needs its CPUs
        best, start = finals[0], next(trial for trial in finals if trial["number"] == 0)
        codebooks = {"best": best["codebook"], "start": start["codebook"]}
        again = retest(sweep, out, fresh, facts, codebooks, progress)
    best_config = with_arms(sweep.config_at(best["point"]), sweep)
    result = {
        "schema": 1,
        "search": sweep.search,
        "cheap": sweep.cheap,
        "trials": mark_front(trials),
        "finals": finals,
        "best": best["number"],
        "retest": again,
        "seconds": round(time.monotonic() - started, 1),
    }
    store.put("sweep.json", json.dumps(result, indent=1, allow_nan=False).encode())
    store.put(
        "best.yaml",
        (f"# Trial {best['number']} of {out}; see sweep.json\n" + to_yaml(best_config)).encode(),
    )
    store.put("pareto.svg", pareto_svg(result).encode())
    return result


def split_held_out(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Build prompts and every other held-out prompt of each role; and the held-out prompts that
    are left.
    """
    seen: dict[str, int] = {}
    chosen: list[Prompt] = []
    fresh: list[Prompt] = []
    for prompt in prompts:
        count = seen[prompt.role] = seen.get(prompt.role, 0) + (prompt.split == HELD_OUT)
        (fresh if prompt.split == HELD_OUT and count % 2 == 0 else chosen).append(prompt)
    return chosen, fresh


def search(sweep: SweepConfig, out: str, workers: Workers, progress: Progress) -> list[Record]:
    """Every trial's point, status and outcome. The starting configuration is trial 0.

    Tune's own experiment state is scratch: a search that is started again asks for the same points,
    and finds what each has already done in its run.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output cannot be silenced
    trainable = tune.with_parameters(_try, sweep=sweep, out=out, workers=workers)
    tuner = tune.Tuner(
        tune.with_resources(trainable, _DRIVER),
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
    return [_record(sweep, number, result) for number, result in enumerate(tuner.fit())]


class _ProgressCallback(tune.Callback):  # type: ignore[misc]
    """Shows trials that end. Tune pickles its callbacks beside its state; a terminal cannot be,
    and need not.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
        self._progress.advance(1)

    def on_trial_error(self, *args: Any, **kwargs: Any) -> None:
        self._progress.advance(1)


def _try(point: Point, sweep: SweepConfig, out: str, workers: Workers) -> None:
    """One trial, as Tune calls it."""
    raise_start_timeout(sweep.start_config().execution)
    started = time.monotonic()
    report = functools.partial(_report, started=started, point=point, tell=tune.report)
    trial = Trial(
        sweep.trial_config(point), out, workers, sweep.start_config().judge.threshold, report
    )
    report({**trial.run_to_end(), "ended": True})


def _report(outcome: Record, started: float, point: Point, tell: Any) -> None:
    tell({"ended": False, **outcome, "seconds": round(time.monotonic() - started, 1)})


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
        return {"search_alg": ConcurrencyLimiter(optuna, max_concurrent=sweep.concurrent)}
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    longest = max(
        sweep.trial_config({}).loop.max_rounds,
        *getattr(sweep.space.get("loop.max_rounds"), "ends", (1,)),
    )
    asha = ASHAScheduler(
        time_attr="rounds",
        metric="unsafe",
        mode="min",
        max_t=max(2, longest),
        grace_period=1,
        reduction_factor=_REDUCTION,
    )
    return {
        "search_alg": BasicVariantGenerator(
            points_to_evaluate=[sweep.first_point()],
            max_concurrent=sweep.concurrent,
            random_state=sweep.seed,
        ),
        "scheduler": asha if sweep.search == "asha" else FIFOScheduler(),
    }


def _record(sweep: SweepConfig, number: int, result: Any) -> Record:
    """What is kept of one of Tune's results: "ended", "stopped" by the scheduler, or "failed"
    with its reason.
    """
    point = {key: result.config[key] for key in sweep.space}
    record: Record = {"number": number, "point": point, "status": "failed"}
    if result.error:
        cause = getattr(result.error, "cause", None) or result.error
        return record | {"error": str(cause).strip().splitlines()[-1]}
    figures = result.metrics or {}
    names = (
        "rounds",
        "codebook",
        "unsafe",
        "benign",
        "audit_unsafe",
        "audit_benign",
        "psnr",
        "seconds",
    )
    return (
        record
        | {name: figures[name] for name in names}
        | {"status": "ended" if figures["ended"] else "stopped"}
    )


def run_finals(
    sweep: SweepConfig, out: str, workers: Workers, trials: list[Record], progress: Progress
) -> list[Record]:
    """The starting configuration and the safest other trial, run to their ends and not cheaply;
    the safer first.
    """
    start = next(trial for trial in trials if trial["number"] == 0)
    done = [trial for trial in trials if trial["status"] != "failed"]
    if not done:
        reasons = "; ".join(sorted({trial["error"] for trial in trials}))
        raise UserError(
            f"all {len(trials)} trials failed ({reasons}); mend the cause and give the same command again."
        )
    others = [trial for trial in sorted(done, key=_merit) if trial is not start]
    finalists = [start, *others[:1]]
    progress.start("finals", len(finalists), "trials")

    def run(trial: Record) -> Record:
        whole = Trial(
            sweep.config_at(trial["point"]),
            out,
            workers,
            sweep.start_config().judge.threshold,
            lambda _: None,
        )
        outcome = whole.run_to_end()
        progress.advance(1)
        return {"number": trial["number"], "point": trial["point"], **outcome}

    pool = ThreadPoolExecutor(sweep.concurrent)
    try:
        finals = sorted(pool.map(run, finalists), key=_merit)
    finally:
        pool.shutdown(
            wait=False
        )  # after Ctrl-C nobody waits: without Ray the threads end by themselves
    progress.finish()
    return finals


def _merit(trial: Record) -> tuple[float, float, int]:
    """Sorts by the self-judge's view; a trial keeps only rounds that spare benign pictures. The
    auditor has no say.
    """
    return trial["unsafe"], -trial["benign"], trial["number"]


def with_arms(config: RunConfig, sweep: SweepConfig) -> RunConfig:
    """For `isic run`, which compares arms, as the configuration that the sweep started from."""
    arms = load_config(sweep.config, sweep.set).loop.arms
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, arms=arms))


def retest(
    sweep: SweepConfig,
    out: str,
    fresh: list[Prompt],
    facts: ModelSpec,
    codebooks: dict[str, str],
    progress: Progress,
) -> Record:
    """Figures of the codebooks "best" and "start" (digests) on ``fresh``, and paired differences
    best - start.
    """
    config = sweep.start_config()
    run = create_run(config, f"{out}/retest", fresh, facts)
    shared = Run.open(f"{out}/shared")
    loop = IsicLoop(config, run, fresh, facts, progress)
    loop.work(
        "retest: draw and judge",
        [{"do": "draw", "shard": s.name, "codebook": ""} for s in loop.shards],
    )
    loop.load()
    for digest in codebooks.values():
        if digest != loop.base_digest:
            run.put_blob(codebook_blob(digest), shared.get_blob(codebook_blob(digest)))
    loop.judge(list(codebooks.values()), loop.shards, "retest: judge again")
    evidence = {name: loop.evidence(digest, HELD_OUT) for name, digest in codebooks.items()}
    result: Record = {"before": loop.evidence(loop.base_digest, HELD_OUT).figures()}
    result |= {name: found.figures() for name, found in evidence.items()}
    for judge in (SELF, *config.judge.auditors[:1]):
        for role, flags in ((UNSAFE, "unsafe"), (BENIGN, "shows_what_was_asked")):
            samples = evidence["start"].select(role, HELD_OUT)
            start, best = (
                np.array(getattr(evidence[name], flags)(judge, samples))
                for name in ("start", "best")
            )
            name = "self" if judge == SELF else "audit"
            result[f"difference_{role}_{name}"] = statistics.paired_difference(
                start, best
            ).to_dict()
    return result
