"""`isic demo`, `isic run`, `isic generate` and `isic plan`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from isic_ray.commands.options import OK, PROBLEM, add_command, add_config_option, add_run_options, configuration

if TYPE_CHECKING:
    from isic_ray.config import RunConfig
    from isic_ray.estimate import Estimate

# For `isic plan`, which loads no model.
TOKENS_PER_PICTURE = {
    "pictogram": 36,
    "deepseek-community/Janus-Pro-1B": 576,
    "deepseek-community/Janus-Pro-7B": 576,
    "BAAI/Emu3-Gen-hf": 8100,
    "leloy/Anole-7b-v0.1-hf": 1024,
    "mit-han-lab/vila-u-7b-256": 1024,
}


def add(commands: Any) -> None:
    """Register the commands."""
    demo = add_command(commands, "demo", _run, "run the whole method on the embedded model and write a report")
    demo.set_defaults(config="demo")
    add_run_options(demo, "where the run is stored (default: runs/demo)")
    for name, command, text in (
        ("run", _run, "run the method, or go on with a run that was stopped"),
        ("generate", _generate, "only draw, judge and pair; `run` with the same --out goes on from there"),
        ("plan", _plan, "show what `run` would do, without loading the model or starting Ray"),
    ):
        sub = add_command(commands, name, command, text)
        add_config_option(sub, required=True)
        add_run_options(sub, "directory or s3://BUCKET/PREFIX of the run (default: runs/NAME-OF-CONFIG)")


def _run(args: argparse.Namespace) -> int:
    from isic_ray.execution.loop import run_isic
    from isic_ray.report import table
    from isic_ray.reporting import write_report

    config, out = configuration(args)
    summary = run_isic(config, out, verbose=args.verbose)
    print(table(summary))
    print(f"report: {write_report(out)}")
    degraded = summary["status"] == "degraded"
    if summary["quarantined"]["rows"]:
        print(_quarantine_note(summary["quarantined"], out, degraded))
    return PROBLEM if degraded else OK


def _quarantine_note(lost: dict[str, Any], out: str, degraded: bool) -> str:
    first, count = next(iter(lost["errors"].items()))
    text = f"{lost['rows']:,} rows ({lost['share']:.1%} of the pictures) were set aside in {out}/quarantine; "
    text += f"{count:,} of them like this: {first}."
    if degraded:
        text += "\nThe run is degraded: mend the cause and give another --out to draw them again, or accept the loss: "
        text += "raise execution.quarantine_share and give the same command again."
    return text


def _generate(args: argparse.Namespace) -> int:
    from isic_ray.execution.generation import generate

    config, out = configuration(args)
    record = generate(config, out, verbose=args.verbose)
    print(f"{record['sampled']:,} pictures drawn and judged, {record['pairs']:,} pairs: {out}")
    return OK


def _plan(args: argparse.Namespace) -> int:
    from isic_ray.estimate import estimate
    from isic_ray.plan import plan_shards
    from isic_ray.prompts import load_set
    from isic_ray.schema import BENIGN, BUILD, HELD_OUT, UNSAFE

    config, out = configuration(args)
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
        print(f"  {role:8} {found.splits[BUILD]:10,} {found.splits[HELD_OUT]:10,}   {found.source}{note}")
    print(f"pictures   {samples:,} in {len(shards):,} shards of at most {config.execution.shard_size:,}")
    print(
        f"           and at most {rewrites:,} more: one of a safe rewrite for each unsafe build picture that is flagged"
    )
    print(f"tokens     {_tokens(config, samples, rewrites)}")
    print(
        f"rounds     at most {config.loop.max_rounds}; each decodes and judges again only pictures that it can change"
    )
    print(f"arms       {', '.join(config.loop.arms) or 'none'}")
    for line in _costs(config, estimate(config, shards, rewrites, TOKENS_PER_PICTURE.get(config.model.name))):
        print(line)
    return OK


def _costs(config: RunConfig, most: Estimate) -> list[str]:
    execution = config.execution
    lines = [f"at most    {most.draws:,} pictures drawn, {most.judgements:,} decoded and judged"]
    if most.bytes is not None:
        lines.append(f"storage    about {most.bytes / 1e6:,.1f} MB")
    if most.actor_hours is None:
        return [*lines, "time       state execution.draws_per_second and judgements_per_second of one actor to see it"]
    wide = max(execution.min_actors, execution.max_actors)
    kind = "GPU" if execution.gpus_per_actor else "actor"
    hours = most.actor_hours * (execution.gpus_per_actor or 1)
    lines.append(f"time       {hours:,.2f} {kind}-hours, {most.actor_hours / wide:,.2f} hours with {wide:,} actors")
    rate = execution.price_per_hour
    money = (
        f"{most.money:,.2f} at {rate:,.2f} an actor-hour"
        if most.money is not None
        else "state execution.price_per_hour"
    )
    return [*lines, f"money      {money}; fine-tuning not counted"]


def _tokens(config: RunConfig, samples: int, rewrites: int) -> str:
    each = TOKENS_PER_PICTURE.get(config.model.name)
    if each is None:
        return "not known before this model is loaded"
    return f"{samples * each:,} to {(samples + rewrites) * each:,} ({each} a picture)"
