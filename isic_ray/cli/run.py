"""`isic demo`, `run`, `generate`, `plan`, `sweep` and `retrain`: what starts work on a cluster."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from isic_ray.cli.options import (
    OK,
    PROBLEM,
    add_command,
    add_config_option,
    add_run_options,
    configuration,
)

if TYPE_CHECKING:
    from isic_ray.config.run import RunConfig
    from isic_ray.metrics.summary import Quarantined
    from isic_ray.workflows.estimate import Cost


def add(commands: Any) -> None:
    """Register the commands."""
    demo = add_command(
        commands, "demo", _run, "run the whole method on the embedded model and write a report"
    )
    demo.set_defaults(config="demo")
    add_run_options(demo, "where the run is stored (default: runs/demo)")
    for name, command, text in (
        ("run", _run, "run the method, or go on with a run that was stopped"),
        (
            "generate",
            _generate,
            "only draw, judge and pair; `run` with the same --out goes on from there",
        ),
        ("plan", _plan, "show what `run` would do, without loading the model or starting Ray"),
    ):
        sub = add_command(commands, name, command, text)
        add_config_option(sub, required=True)
        add_run_options(
            sub, "directory or s3://BUCKET/PREFIX of the run (default: runs/NAME-OF-CONFIG)"
        )
    _add_sweep(commands)
    _add_retrain(commands)


def _run(args: argparse.Namespace) -> int:
    from isic_ray.report.numbers import table
    from isic_ray.report.write import write_report
    from isic_ray.workflows.loop import run_isic

    config, out = configuration(args)
    summary = run_isic(config, out, verbose=args.verbose)
    print(table(summary))
    print(f"report: {write_report(out)}")
    degraded = summary.status == "degraded"
    if summary.quarantined.rows:
        print(_quarantine_note(summary.quarantined, out, degraded))
    return PROBLEM if degraded else OK


def _quarantine_note(lost: Quarantined, out: str, degraded: bool) -> str:
    """What a user should know of rows that failed."""
    first, count = next(iter(lost.errors.items()))
    text = (
        f"{lost.rows:,} rows ({lost.share:.1%} of the pictures) were set aside in "
        f"{out}/quarantine; {count:,} of them like this: {first}."
    )
    if degraded:
        text += (
            "\nThe run is degraded: fix the cause and give another --out to draw them again, or "
            "accept the loss: raise execution.quarantine_share and give the same command again."
        )
    return text


def _generate(args: argparse.Namespace) -> int:
    from isic_ray.workflows.loop import generate

    config, out = configuration(args)
    first = generate(config, out, verbose=args.verbose)
    print(f"{first.sampled:,} pictures drawn and judged, {first.pairs:,} pairs: {out}")
    return OK


def _plan(args: argparse.Namespace) -> int:
    from isic_ray.models.catalogue import tokens_per_picture
    from isic_ray.prompts.sets import load_set
    from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE
    from isic_ray.runs.shards import plan_shards
    from isic_ray.workflows.estimate import estimate_cost

    config, out = configuration(args)
    per_picture = tokens_per_picture(config.model.name)
    per_prompt = config.prompts.samples_per_prompt
    sets = {
        UNSAFE: load_set(config.prompts.unsafe, UNSAFE, config.prompts),
        BENIGN: load_set(config.prompts.benign, BENIGN, config.prompts),
    }
    prompts = [prompt for found in sets.values() for prompt in found.prompts]
    shards = plan_shards(prompts, per_prompt, config.execution.shard_size)
    samples = sum(len(shard.cells) for shard in shards)
    rewrites = sets[UNSAFE].splits[BUILD] * per_prompt
    print(f"model      {config.model.name}")
    print(f"run        {out}")
    print(f"{'prompts':10} {'build':>10} {'held out':>10}")
    for role, found in sets.items():
        note = f"   {found.duplicates:,} duplicates left out" if found.duplicates else ""
        counts = f"{found.splits[BUILD]:10,} {found.splits[HELD_OUT]:10,}"
        print(f"  {role:8} {counts}   {found.source}{note}")
    size = config.execution.shard_size
    print(f"pictures   {samples:,} in {len(shards):,} shards of at most {size:,}")
    print(
        f"           and at most {rewrites:,} more: one of a safe rewrite for each unsafe build "
        "picture that is flagged"
    )
    print(f"tokens     {_tokens(per_picture, samples, rewrites)}")
    print(
        f"rounds     at most {config.loop.max_rounds}; each decodes and judges again only pictures "
        "that it can change"
    )
    print(f"arms       {', '.join(config.loop.arms) or 'none'}")
    print("\n".join(_costs(config, estimate_cost(config, shards, rewrites, per_picture))))
    return OK


def _costs(config: RunConfig, most: Cost) -> list[str]:
    execution = config.execution
    lines = [f"at most    {most.draws:,} pictures drawn, {most.judgements:,} decoded and judged"]
    if most.bytes is not None:
        lines.append(f"storage    about {most.bytes / 1e6:,.1f} MB")
    if most.actor_hours is None:
        missing = "execution.draws_per_second and judgements_per_second"
        return [*lines, f"time       state {missing} of one actor to see it"]
    wide = max(execution.min_actors, execution.max_actors)
    kind = "GPU" if execution.gpus_per_actor else "actor"
    hours = most.actor_hours * (execution.gpus_per_actor or 1)
    elapsed = most.actor_hours / wide
    lines.append(f"time       {hours:,.2f} {kind}-hours, {elapsed:,.2f} hours with {wide:,} actors")
    rate, money = execution.price_per_hour, "state execution.price_per_hour"
    if most.money is not None:
        money = f"{most.money:,.2f} at {rate:,.2f} an actor-hour"
    return [*lines, f"money      {money}; fine-tuning not counted"]


def _tokens(each: int | None, samples: int, rewrites: int) -> str:
    if each is None:
        return "not known before this model is loaded"
    return f"{samples * each:,} to {(samples + rewrites) * each:,} ({each} a picture)"


def _add_sweep(commands: Any) -> None:
    """Register the command."""
    sweep = add_command(
        commands, "sweep", _sweep, "search the method's settings, all trials on the same pictures"
    )
    text = "a YAML file or URI, or a shipped sweep: demo"
    sweep.add_argument("--config", required=True, metavar="FILE", help=text)
    sweep.add_argument(
        "--out", required=True, metavar="URI", help="directory or s3://BUCKET/PREFIX of the sweep"
    )
    sweep.add_argument(
        "--verbose", action="store_true", help="also show what Ray and the libraries say"
    )


def _sweep(args: argparse.Namespace) -> int:
    from isic_ray.config.sweep import load_sweep
    from isic_ray.report.sweep import sweep_table
    from isic_ray.workflows.sweep import run_sweep

    result = run_sweep(load_sweep(args.config), args.out, verbose=args.verbose)
    print(sweep_table(result))
    print(f"the chosen settings, for `isic run --config`: {args.out.rstrip('/')}/best.yaml")
    return PROBLEM if any(trial["status"] == "failed" for trial in result["trials"]) else OK


def _add_retrain(commands: Any) -> None:
    """Register the command."""
    retrain = add_command(
        commands, "retrain", _retrain, "retrain a run's codebook in the harmless space on pictures"
    )
    retrain.add_argument(
        "--run", required=True, metavar="URI", help="a run that has ended: its model and codebook"
    )
    text = "folder of pictures, or of Parquet files or WebDataset tars that hold them"
    retrain.add_argument("--pictures", required=True, metavar="URI", help=text)
    retrain.add_argument(
        "--out",
        required=True,
        metavar="URI",
        help="directory or s3://BUCKET/PREFIX of the training",
    )
    text = "change a setting, such as steps=5000 or workers=8 (see isic_ray/config/retrain.py)"
    retrain.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=text
    )
    retrain.add_argument(
        "--verbose", action="store_true", help="also show what Ray and the libraries say"
    )


def _retrain(args: argparse.Namespace) -> int:
    from isic_ray.config.retrain import retrain_config
    from isic_ray.workflows.retrain import retrain

    config = retrain_config(args.run, args.pictures, args.set)
    result = retrain(config, args.out, verbose=args.verbose)
    before, after = result["before"]["evaluation_loss"], result["after"]["evaluation_loss"]
    print(
        f"reconstruction loss on pictures set aside: {before:.4f} before, {after:.4f} after "
        f"{result['steps']:,} steps"
    )
    print(f"largest component in the harmful space: {result['largest_harmful_component']:.1e}")
    print(f"codebook: {args.out.rstrip('/')}/{result['safe_codebook']}")
    return OK
