"""Commands that look at a run that is stored: `isic report`, `isic verify`, `isic export`."""

from __future__ import annotations

import argparse
from typing import Any

from isic_ray.commands.options import OK, PROBLEM, add_command, check_ended


def add(commands: Any) -> None:
    """Register the commands."""
    report = add_command(commands, "report", _report, "write a run's report again")
    report.add_argument("uri", metavar="URI", help="the run")
    report.add_argument("--reveal", action="store_true", help="show flagged pictures unpixelated; needs --out")
    report.add_argument("--out", metavar="FILE", help="where the page goes (default: the run's report/index.html)")

    verify = add_command(commands, "verify", _verify, "read every object of a run again and name what is damaged")
    verify.add_argument("uri", metavar="URI", help="the run")

    export = add_command(commands, "export", _export, "write the edited checkpoint of a run that has ended")
    export.add_argument("--run", required=True, metavar="URI", help="the run")
    export.add_argument("--to", required=True, metavar="DIR", help="new or empty directory")


def _report(args: argparse.Namespace) -> int:
    from isic_ray.reporting import write_report

    check_ended(args.uri)
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

    check_ended(args.run)
    print(f"{export_run(args.run, args.to)}: load it with transformers' from_pretrained")
    return OK
