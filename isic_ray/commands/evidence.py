"""`isic evaluate`, `isic compare` and `isic explain`: what a finished run's edit is worth, and what it does."""

from __future__ import annotations

import argparse
from typing import Any

from isic_ray.commands.options import OK, PROBLEM, add_command, check_ended


def add(commands: Any) -> None:
    """Register the commands."""
    evaluate = add_command(
        commands, "evaluate", _evaluate, "measure a run with more arms, prompts and attacks, and report it"
    )
    evaluate.add_argument("--run", required=True, metavar="URI", help="the run")
    evaluate.add_argument("--prompts", nargs="+", default=[], metavar="FILE", help="more unsafe prompts, all held out")
    evaluate.add_argument("--benign", nargs="+", default=[], metavar="FILE", help="more benign prompts, all held out")
    evaluate.add_argument("--limit", type=int, default=300, metavar="N", help="prompts of each set (default: 300)")
    evaluate.add_argument("--negative", default="", metavar="TEXT", help="negative prompt of the guidance baseline")
    evaluate.add_argument(
        "--attacked", type=int, default=32, metavar="N", help="prompts that searches attack; 0 = none (default: 32)"
    )
    evaluate.add_argument("--address", metavar="ADDRESS", help="Ray cluster (default: as the run's configuration says)")
    evaluate.add_argument("--verbose", action="store_true", help="also show what Ray and the libraries say")

    compare = add_command(commands, "compare", _compare, "set the figures of runs side by side")
    compare.add_argument("uris", nargs="+", metavar="RUN", help="two runs or more")

    explain = add_command(commands, "explain", _explain, "say which codes a run's edit changed, and how far")
    explain.add_argument("uri", metavar="URI", help="the run")


def _evaluate(args: argparse.Namespace) -> int:
    from isic_ray.errors import UserError
    from isic_ray.evidence import Plan
    from isic_ray.execution.evidence import evaluate
    from isic_ray.report.evidence import evidence_table
    from isic_ray.reporting import write_report

    if args.limit < 0 or args.attacked < 0:
        raise UserError("--limit and --attacked must be 0 or more")
    plan = Plan(
        limit=args.limit,
        unsafe_files=tuple(args.prompts),
        benign_files=tuple(args.benign),
        negative=args.negative,
        attacked=args.attacked,
    )
    execution = {"address": args.address} if args.address else {}
    evidence = evaluate(args.run, plan, execution, verbose=args.verbose)
    print(evidence_table(evidence), end="")
    print(f"report: {write_report(args.run)}")
    return PROBLEM if evidence["alarm"] else OK


def _compare(args: argparse.Namespace) -> int:
    from isic_ray.comparison import compare_runs

    for uri in args.uris:
        check_ended(uri)
    print(compare_runs(args.uris), end="")
    return OK


def _explain(args: argparse.Namespace) -> int:
    from isic_ray.report.evidence import explanation_table
    from isic_ray.reporting import explain_run

    check_ended(args.uri)
    print(explanation_table(explain_run(args.uri)), end="")
    return OK
