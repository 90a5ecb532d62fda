"""`isic sweep`: search the method's settings. Every trial is a run on the same pictures.

Trials are resumable like any run, so a sweep that is started again does no work twice.
"""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

from isic_ray.config.describe import to_yaml
from isic_ray.config.run import RunConfig, load_config
from isic_ray.config.sweep import Point, SweepConfig
from isic_ray.errors import UserError
from isic_ray.execution.pool import ActorPool, RayWorkers
from isic_ray.execution.progress import Progress
from isic_ray.execution.session import ray_session
from isic_ray.execution.training import train_deltas, training_groups
from isic_ray.execution.tuning import Metrics, Tell, Tried, search
from isic_ray.metrics.statistics import paired_difference
from isic_ray.metrics.summary import AUDIT, SELF
from isic_ray.models.base import ModelSpec
from isic_ray.models.registry import read_spec
from isic_ray.prompts.sets import load_prompts
from isic_ray.report.sweep import mark_front, pareto_svg
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Prompt
from isic_ray.runs.shards import codebook_blob
from isic_ray.runs.store import Store
from isic_ray.workflows.loop import create_run, steps_of
from isic_ray.workflows.steps import Steps
from isic_ray.workflows.trial import Outcome, SharedWorkers, run_trial
from isic_ray.workflows.worker import ShardWorker

Record = dict[str, Any]  # a JSON object of sweep.json
_KEPT = (
    *("rounds", "codebook", "unsafe", "benign", "audit_unsafe", "audit_benign", "psnr"),
    "seconds",
)


def run_sweep(sweep: SweepConfig, out: str, verbose: bool = False) -> Record:
    """Search, or go on with a search; leave `sweep.json`, `best.yaml` and `pareto.svg` at ``out``.

    Half of the held-out prompts compare the trials; the other half is kept for one last test of the
    chosen point against the starting configuration. Returns the content of sweep.json. Raises
    UserError when no trial succeeds.
    """
    started, store, shared = time.monotonic(), Store.open(out), sweep.shared_config()
    out = store.uri
    chosen, fresh = split_held_out(load_prompts(shared.prompts))
    progress = Progress()
    with ray_session(shared.execution, verbose):
        spec = read_spec(shared.model)
        run = create_run(shared, f"{out}/shared", chosen, spec)
        with closing(ActorPool(ShardWorker, shared, run.store.uri)) as pool:
            trials, finals = _try_points(sweep, out, run, chosen, spec, pool, progress)
        # The last test comes after the pool has given back its CPUs.
        best, start = finals[0], next(trial for trial in finals if trial["number"] == 0)
        codebooks = {"best": best["codebook"], "start": start["codebook"]}
        again = retest(sweep, out, fresh, spec, codebooks, progress)
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
    config = with_arms(sweep.config_at(best["point"]), sweep)
    note = f"# Trial {best['number']} of {out}; see sweep.json\n"
    store.put("sweep.json", json.dumps(result, indent=1, allow_nan=False).encode())
    store.put("best.yaml", (note + to_yaml(config)).encode())
    store.put("pareto.svg", pareto_svg(result).encode())
    return result


def split_held_out(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Split off every other held-out prompt of each role.

    Returns the build prompts with the held-out ones that are left, and those that were split off.
    """
    seen: dict[str, int] = {}
    chosen: list[Prompt] = []
    fresh: list[Prompt] = []
    for prompt in prompts:
        count = seen[prompt.role] = seen.get(prompt.role, 0) + (prompt.split == HELD_OUT)
        (fresh if prompt.split == HELD_OUT and count % 2 == 0 else chosen).append(prompt)
    return chosen, fresh


def with_arms(config: RunConfig, sweep: SweepConfig) -> RunConfig:
    """Return ``config`` with the arms of the configuration that the sweep started from."""
    arms = load_config(sweep.config, sweep.set).loop.arms
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, arms=arms))


def retest(
    sweep: SweepConfig,
    out: str,
    fresh: list[Prompt],
    spec: ModelSpec,
    codebooks: dict[str, str],
    progress: Progress,
) -> Record:
    """Measure the codebooks "best" and "start" (digests) on prompts that no trial saw.

    Returns the figures before any edit and of each, and the paired differences best - start.
    """
    config = sweep.start_config()
    run, shared = create_run(config, f"{out}/retest", fresh, spec), Run.open(f"{out}/shared")
    with steps_of(config, run, fresh, spec, progress) as steps:
        steps.draw("retest: draw and judge")
        for digest in codebooks.values():
            if digest != steps.base:
                run.put_blob(codebook_blob(digest), shared.get_blob(codebook_blob(digest)))
        steps.judge(list(codebooks.values()), steps.shards, "retest: judge again")
    before = steps.verdicts(steps.base, HELD_OUT)
    start, best = (steps.verdicts(codebooks[name], HELD_OUT) for name in ("start", "best"))
    found = {"before": before, "best": best, "start": start}
    result: Record = {name: each.figures().to_record() for name, each in found.items()}
    unsafe, benign = (start.select(role, HELD_OUT) for role in (UNSAFE, BENIGN))
    for judge in (SELF, *config.judge.auditors[:1]):
        key = SELF if judge == SELF else AUDIT
        safer = paired_difference(start.unsafe(judge, unsafe), best.unsafe(judge, unsafe))
        truer = paired_difference(
            start.shows_what_was_asked(judge, benign), best.shows_what_was_asked(judge, benign)
        )
        result[f"difference_{UNSAFE}_{key}"] = safer.to_dict()
        result[f"difference_{BENIGN}_{key}"] = truer.to_dict()
    return result


def _try_points(
    sweep: SweepConfig,
    out: str,
    run: Run,
    prompts: list[Prompt],
    spec: ModelSpec,
    pool: ActorPool,
    progress: Progress,
) -> tuple[list[Record], list[Record]]:
    """Draw the shared pictures, search, and run the finals; the records of trials and finals."""
    shared, threshold = sweep.shared_config(), sweep.start_config().judge.threshold
    workers = RayWorkers(ShardWorker, shared, run.store.uri, pool)
    groups = training_groups(shared, run, spec.codebook, kept=True, count=sweep.concurrent)
    with closing(groups) as trainers:
        train = partial(train_deltas, trainers, shared.finetune, run)
        Steps(shared, run, prompts, spec, workers, train, progress).draw_and_judge()
        trainers.start()
        both = SharedWorkers(pool, trainers)

        def trial(point: Point, tell: Tell) -> Metrics:
            def report(outcome: Outcome) -> None:
                tell(dataclasses.asdict(outcome))

            config = sweep.trial_config(point)
            return dataclasses.asdict(run_trial(config, out, both, threshold, report))

        progress.start("trials", sweep.trials, "trials")
        trials = [
            _record(number, tried) for number, tried in enumerate(search(sweep, trial, progress))
        ]
        progress.finish()
        return trials, _run_finals(sweep, out, both, trials, progress)


def _record(number: int, tried: Tried) -> Record:
    """What sweep.json keeps of a trial."""
    record: Record = {"number": number, "point": tried.point, "status": tried.status}
    if tried.status == "failed":
        return record | {"error": tried.error}
    return record | {name: tried.metrics[name] for name in _KEPT}


def _run_finals(
    sweep: SweepConfig, out: str, workers: SharedWorkers, trials: list[Record], progress: Progress
) -> list[Record]:
    """Run the start and the safest other trial to their ends, and not cheaply; the safer first."""
    start = next(trial for trial in trials if trial["number"] == 0)
    done = [trial for trial in trials if trial["status"] != "failed"]
    if not done:
        reasons = "; ".join(sorted({trial["error"] for trial in trials}))
        raise UserError(
            f"all {len(trials)} trials failed ({reasons}); fix the cause and give the same command "
            "again."
        )
    others = [trial for trial in sorted(done, key=_merit) if trial is not start]
    finalists = [start, *others[:1]]
    threshold = sweep.start_config().judge.threshold
    progress.start("finals", len(finalists), "trials")

    def run(trial: Record) -> Record:
        config = sweep.config_at(trial["point"])
        outcome = run_trial(config, out, workers, threshold, report=lambda _: None)
        progress.advance(1)
        named = {"number": trial["number"], "point": trial["point"]}
        return {**named, **dataclasses.asdict(outcome)}

    threads = ThreadPoolExecutor(sweep.concurrent)
    try:
        finals = sorted(threads.map(run, finalists), key=_merit)
    finally:
        # After Ctrl-C nobody waits: without Ray the threads end by themselves.
        threads.shutdown(wait=False)
    progress.finish()
    return finals


def _merit(trial: Record) -> tuple[float, float, int]:
    """Sort by the self-judge's view, safest first.

    A trial keeps only rounds that spare benign pictures. The auditor has no say.
    """
    return trial["unsafe"], -trial["benign"], trial["number"]
