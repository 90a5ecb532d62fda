"""Commands that look at a run that is stored: `isic status`, `report`, `verify`, `gc`, `export`."""

from __future__ import annotations

import argparse
from typing import Any

from isic_ray.cli.options import OK, PROBLEM, add_command


def add(commands: Any) -> None:
    """Register the commands."""
    status = add_command(
        commands, "status", _status, "show how far a run is and whether anybody is at work on it"
    )
    status.add_argument("uri", metavar="URI", help="the run")
    status.add_argument("--json", action="store_true", help="for programs")

    report = add_command(commands, "report", _report, "write a run's report again")
    report.add_argument("uri", metavar="URI", help="the run")
    report.add_argument(
        "--reveal", action="store_true", help="show flagged pictures unpixelated; needs --out"
    )
    report.add_argument(
        "--out", metavar="FILE", help="where the page goes (default: the run's report/index.html)"
    )

    verify = add_command(
        commands, "verify", _verify, "read every object of a run again and name what is damaged"
    )
    verify.add_argument("uri", metavar="URI", help="the run")

    gc = add_command(
        commands, "gc", _gc, "list objects that killed workers left and nothing refers to"
    )
    gc.add_argument("uri", metavar="URI", help="the run")
    gc.add_argument("--delete", action="store_true", help="delete them")
    gc.add_argument(
        "--grace-hours",
        type=float,
        default=24.0,
        metavar="H",
        help="spare younger ones (default: 24)",
    )

    export = add_command(
        commands, "export", _export, "write the edited checkpoint of a run that has ended"
    )
    export.add_argument("--run", required=True, metavar="URI", help="the run")
    export.add_argument("--to", required=True, metavar="DIR", help="new or empty directory")


def _status(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from isic_ray.report.status import describe
    from isic_ray.runs.run import Run
    from isic_ray.runs.status import read_status

    found = read_status(Run.open(args.uri))
    print(json.dumps(asdict(found), indent=2) if args.json else describe(found))
    return OK


def _gc(args: argparse.Namespace) -> int:
    from isic_ray.runs.garbage import collect, find_garbage
    from isic_ray.runs.run import Run

    run, grace_s = Run.open(args.uri), args.grace_hours * 3600
    found = collect(run, grace_s) if args.delete else find_garbage(run, grace_s)
    for item in found:
        print(f"{item.age / 3600:8.1f} h  {item.key}")
    told = "deleted" if args.delete else "without use"
    if found and not args.delete:
        told += "; --delete removes them"
    print(f"{args.uri}: {len(found)} objects older than {args.grace_hours:g} h {told}")
    return OK


def _report(args: argparse.Namespace) -> int:
    from isic_ray.report.write import write_report

    print(write_report(args.uri, reveal=args.reveal, to=args.out))
    return OK


def _verify(args: argparse.Namespace) -> int:
    from isic_ray.runs.run import Damaged, Run

    try:
        problems = Run.open(args.uri).verify()
    except Damaged as error:
        problems = [str(error)]
    for problem in problems:
        print(problem)
    found = f"{len(problems)} found damaged or missing" if problems else "every object is whole"
    print(f"{args.uri}: {found}")
    return PROBLEM if problems else OK


def _export(args: argparse.Namespace) -> int:
    from isic_ray.workflows.export import export_run

    print(f"{export_run(args.run, args.to)}: load it with transformers' from_pretrained")
    return OK
