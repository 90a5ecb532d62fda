"""`isic`: the command line. Exit codes: 0 well, 1 a problem was found, 2 the input must be fixed,
130 stopped.

Commands import what they need when they run, so that `isic --help` is instant and `isic plan`
starts no Ray.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from isic_ray.cli import evaluate, models, run, stored
from isic_ray.cli.options import OK, STOPPED, USER_ERROR, Parser

COMMANDS = (run, evaluate, stored, models)  # in the order of `isic --help`
_EXAMPLES = """\
examples:
  isic demo                                     the whole method on the embedded model, on two CPUs
  isic run --config janus-pro-1b --out s3://bucket/run \\
      --set prompts.unsafe=red.csv prompts.benign=coco.csv
  isic plan --config my.yaml                    what that would do
  isic export --run runs/demo --to safe-model   a checkpoint for stock transformers

The same command again goes on where the last one stopped. Exit codes: 0 well, 1 a problem was found
(or the run is degraded), 2 the input must be fixed, 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. UserErrors become one line on stderr."""
    from isic_ray.errors import user_error_in

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
        found = user_error_in(error)
        if found is None:
            raise
        print(f"isic: {' '.join(str(found).split())}", file=sys.stderr)
        return USER_ERROR


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``args.command`` runs the chosen one."""
    parser = Parser(
        prog="isic",
        description=(
            "Makes autoregressive image generators safer by editing their visual-token codebook, "
            "on Ray."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=_no_command)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for module in COMMANDS:
        module.add(commands)
    return parser


def _no_command(args: argparse.Namespace) -> int:
    build_parser().print_help(sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
