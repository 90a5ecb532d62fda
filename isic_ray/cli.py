"""`isic`: the command line. Exit codes: 0 well, 1 a problem was found, 2 the input must be mended, 130 stopped.

Commands import what they need when they run, so that `isic --help` is instant and `isic plan` starts no Ray.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from isic_ray.config import RunConfig
    from isic_ray.prompts import PromptSet

OK, PROBLEM, USER_ERROR, STOPPED = 0, 1, 2, 130
# For `isic plan`, which loads no model.
TOKENS_PER_PICTURE = {
    "pictogram": 36,
    "deepseek-community/Janus-Pro-1B": 576,
    "deepseek-community/Janus-Pro-7B": 576,
}
_EXAMPLES = """\
examples:
  isic demo                                         the whole method on the embedded model, on two CPU cores
  isic run --config janus-pro-1b --set prompts.unsafe=red.csv prompts.benign=coco.csv --out s3://bucket/run
  isic plan --config my.yaml                        what that would do
  isic export --run runs/demo --to safe-model       a checkpoint for stock transformers

The same command again goes on where the last one stopped. Exit codes: 0 well, 1 a problem was found (or the run is
degraded), 2 the input must be mended, 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. UserErrors become one line on stderr."""
    from isic_ray.errors import UserError

    parser = build_parser()
    args = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        code = command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `isic config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("\nisic: stopped; run the same command again to go on", file=sys.stderr)
        return STOPPED
    except Exception as error:
        cause = getattr(error, "cause", None)  # Ray wraps what a worker raised
        found = error if isinstance(error, UserError) else cause
        if not isinstance(found, UserError):
            raise
        print(f"isic: {' '.join(str(found).split())}", file=sys.stderr)
        return USER_ERROR


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the program does."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"isic: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``args.command`` is the function that runs the chosen one."""
    parser = _Parser(
        prog="isic",
        description="Makes autoregressive image generators safer by editing their visual-token codebook, on Ray.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=_no_command)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    demo = _command(commands, "demo", _demo, "run the whole method on the embedded model and write a report")
    demo.set_defaults(config="demo")
    _add_run_options(demo, "where the run is stored (default: runs/demo)")

    for name, command, text in (
        ("run", _run, "run the method, or go on with a run that was stopped"),
        ("plan", _plan, "show what `run` would do, without loading the model or starting Ray"),
    ):
        sub = _command(commands, name, command, text)
        _add_config_option(sub, required=True)
        _add_run_options(sub, "directory or s3://BUCKET/PREFIX of the run (default: runs/NAME-OF-CONFIG)")

    report = _command(commands, "report", _report, "write a run's report again")
    report.add_argument("uri", metavar="URI", help="the run")
    report.add_argument("--reveal", action="store_true", help="show flagged pictures unpixelated; needs --out")
    report.add_argument("--out", metavar="FILE", help="where the page goes (default: the run's report/index.html)")

    verify = _command(commands, "verify", _verify, "read every object of a run again and name what is damaged")
    verify.add_argument("uri", metavar="URI", help="the run")

    export = _command(commands, "export", _export, "write the edited checkpoint of a run that has ended")
    export.add_argument("--run", required=True, metavar="URI", help="the run")
    export.add_argument("--to", required=True, metavar="DIR", help="new or empty directory")

    prompts = _command(commands, "prompts", _no_command, "look into prompt files").add_subparsers(
        metavar="inspect", required=True, parser_class=_Parser
    )
    inspect = _command(prompts, "inspect", _inspect, "rows, columns, duplicates, splits and categories of a file")
    inspect.add_argument("file", metavar="FILE", help="path or URI of a .csv, .jsonl or .parquet file")

    config = _command(commands, "config", _config, "print every setting with its type, value and meaning, as YAML")
    _add_config_option(config, required=False)
    _add_set_option(config)
    _command(commands, "version", _version, "print the versions of isic_ray and what it stands on")
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(command=function)
    return parser


def _add_config_option(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--config", required=required, metavar="FILE", help="a YAML file, or a recipe: demo, janus-pro-1b, janus-pro-7b"
    )


def _add_set_option(parser: argparse.ArgumentParser) -> None:
    text = "change a setting, such as edit.strength=0.5 (see `isic config`); may be given often"
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=text)


def _add_run_options(parser: argparse.ArgumentParser, out: str) -> None:
    _add_set_option(parser)
    parser.add_argument("--out", metavar="URI", help=out)
    parser.add_argument("--verbose", action="store_true", help="also show what Ray and the libraries say")


# Commands


def _no_command(args: argparse.Namespace) -> int:
    build_parser().print_help(sys.stderr)
    return USER_ERROR


def _demo(args: argparse.Namespace) -> int:
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from isic_ray.execution.loop import run_isic
    from isic_ray.report import table
    from isic_ray.reporting import write_report

    config, out = _configuration(args)
    summary = run_isic(config, out, verbose=args.verbose)
    print(table(summary))
    print(f"report: {write_report(out)}")
    return PROBLEM if summary["status"] == "degraded" else OK


def _plan(args: argparse.Namespace) -> int:
    from isic_ray.plan import plan_shards
    from isic_ray.prompts import load_set
    from isic_ray.schema import BENIGN, BUILD, HELD_OUT, UNSAFE

    config, out = _configuration(args)
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
    return OK


def _tokens(config: RunConfig, samples: int, rewrites: int) -> str:
    each = TOKENS_PER_PICTURE.get(config.model.name)
    if each is None:
        return "not known before this model is loaded"
    return f"{samples * each:,} to {(samples + rewrites) * each:,} ({each} a picture)"


def _report(args: argparse.Namespace) -> int:
    from isic_ray.reporting import write_report

    _check_ended(args.uri)
    print(write_report(args.uri, reveal=args.reveal, to=args.out))
    return OK


def _verify(args: argparse.Namespace) -> int:
    from isic_ray.runs import Damaged, Run

    try:
        problems = Run.open(args.uri).verify()
    except Damaged as error:
        problems = [str(error)]
    for problem in problems:
        print(problem)
    print(f"{args.uri}: {f'{len(problems)} found damaged or missing' if problems else 'every object is whole'}")
    return PROBLEM if problems else OK


def _export(args: argparse.Namespace) -> int:
    from isic_ray.export import export_run

    _check_ended(args.run)
    print(f"{export_run(args.run, args.to)}: load it with transformers' from_pretrained")
    return OK


def _inspect(args: argparse.Namespace) -> int:
    from isic_ray.prompts import inspect

    found = inspect(args.file)
    print(f"{args.file}: {found.rows:,} rows, {len(found.prompts):,} distinct prompts, {found.duplicates:,} duplicates")
    print(f"columns     {_columns(found)}")
    how = f"column {found.used['split']!r}" if "split" in found.used else "by hash, no split column"
    if not found.columns:
        how = "by scene"
    print(f"splits      {_counts(found.splits)} ({how})")
    print(f"categories  {_counts(found.categories)}")
    return OK


def _columns(found: PromptSet) -> str:
    meaning = {column: kind for kind, column in found.used.items()}
    return ", ".join(f"{name} ({meaning.get(name, 'not used')})" for name in found.columns) or "none"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _config(args: argparse.Namespace) -> int:
    from isic_ray.config import load_config, to_yaml

    print("# Every setting of isic_ray. Keep what you change, and give the file to `isic run --config FILE`.\n")
    print(to_yaml(load_config(args.config, args.set)), end="")
    return OK


def _version(args: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError, version

    def find(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} not installed"

    parts = [find(name) for name in ("ray", "torch", "transformers", "deepspeed")]
    print(f"{find('isic-ray')} (python {sys.version.split()[0]}, {', '.join(parts)})")
    return OK


def _configuration(args: argparse.Namespace) -> tuple[RunConfig, str]:
    """The configuration, and where the run is stored."""
    from isic_ray.config import load_config

    return load_config(args.config, args.set), args.out or f"runs/{Path(args.config).stem}"


def _check_ended(uri: str) -> None:
    from isic_ray.errors import UserError
    from isic_ray.runs import Run

    if not Run.open(uri).store.exists("summary.json"):
        raise UserError(f"the run at {uri} has not ended; give the same `isic run` command again to go on with it.")


if __name__ == "__main__":
    sys.exit(main())
