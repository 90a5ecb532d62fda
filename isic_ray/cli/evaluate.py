"""Commands that say what a run's edit is worth: `isic evaluate`, `audit`, `compare`, `explain`."""

from __future__ import annotations

import argparse
from typing import Any

from isic_ray.cli.options import OK, PROBLEM, Parser, add_command


def add(commands: Any) -> None:
    """Register the commands."""
    _add_evaluate(commands)
    compare = add_command(commands, "compare", _compare, "set the figures of runs side by side")
    compare.add_argument("uris", nargs="+", metavar="RUN", help="two runs or more")
    _add_audit(commands)
    explain = add_command(
        commands, "explain", _explain, "say which codes a run's edit changed, and how far"
    )
    explain.add_argument("uri", metavar="URI", help="the run")


def _add_evaluate(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "measure a run with more arms, prompts and attacks, and report it",
    )
    evaluate.add_argument("--run", required=True, metavar="URI", help="the run")
    evaluate.add_argument(
        "--prompts", nargs="+", default=[], metavar="FILE", help="more unsafe prompts, all held out"
    )
    evaluate.add_argument(
        "--benign", nargs="+", default=[], metavar="FILE", help="more benign prompts, all held out"
    )
    evaluate.add_argument(
        "--limit", type=int, default=300, metavar="N", help="prompts of each set (default: 300)"
    )
    evaluate.add_argument(
        "--negative", default="", metavar="TEXT", help="negative prompt of the guidance baseline"
    )
    evaluate.add_argument(
        "--attacked",
        type=int,
        default=32,
        metavar="N",
        help="prompts that searches attack; 0 = none (default: 32)",
    )
    evaluate.add_argument(
        "--address",
        metavar="ADDRESS",
        help="Ray cluster (default: as the run's configuration says)",
    )
    evaluate.add_argument(
        "--verbose", action="store_true", help="also show what Ray and the libraries say"
    )


def _add_audit(commands: Any) -> None:
    audit = add_command(commands, "audit", _audit_import, "check a run by hand").add_subparsers(
        metavar="sample|import", required=True, parser_class=Parser
    )
    sheet = add_command(
        audit, "sample", _audit_sample, "write a small blinded sheet of pictures to label"
    )
    sheet.add_argument("uri", metavar="URI", help="the run")
    sheet.add_argument("--to", required=True, metavar="DIR", help="new or empty directory")
    sheet.add_argument(
        "--n",
        type=int,
        default=60,
        help="pictures, half of them drawn after the edit (default: 60)",
    )
    sheet.add_argument(
        "--seed", type=int, default=0, help="another number gives other pictures (default: 0)"
    )
    labels = add_command(
        audit, "import", _audit_import, "read the labels back and correct the judges' rates by them"
    )
    labels.add_argument("uri", metavar="URI", help="the run")
    labels.add_argument(
        "file", metavar="FILE", help="the labels.csv that came with the sheet, filled in"
    )


def _evaluate(args: argparse.Namespace) -> int:
    from isic_ray.errors import UserError
    from isic_ray.report.evidence import evidence_table
    from isic_ray.report.write import write_report
    from isic_ray.workflows.evaluate import evaluate
    from isic_ray.workflows.measures import Plan

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
    from isic_ray.report.compare import compare_runs

    print(compare_runs(args.uris), end="")
    return OK


def _audit_sample(args: argparse.Namespace) -> int:
    from isic_ray.workflows.human_audit import LABELS, SHEET, sample_sheet

    directory = sample_sheet(args.uri, args.to, args.n, args.seed)
    print(
        f"look at {directory}/{SHEET}, write unsafe or safe into {directory}/{LABELS}, "
        "then isic audit import"
    )
    return OK


def _audit_import(args: argparse.Namespace) -> int:
    from isic_ray.report.spot_check import human_table
    from isic_ray.workflows.human_audit import import_labels

    print(human_table(import_labels(args.uri, args.file)), end="")
    return OK


def _explain(args: argparse.Namespace) -> int:
    from isic_ray.report.codebook_pictures import explain_run

    print(explain_run(args.uri), end="")
    return OK
