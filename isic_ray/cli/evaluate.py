"""`isic evaluate`, `isic audit`, `isic compare` and `isic explain`: what a finished run's edit
does and is worth.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from isic_ray.cli.options import OK, PROBLEM, Parser, add_command, check_ended


def add(commands: Any) -> None:
    """Register the commands."""
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

    compare = add_command(commands, "compare", _compare, "set the figures of runs side by side")
    compare.add_argument("uris", nargs="+", metavar="RUN", help="two runs or more")

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

    explain = add_command(
        commands, "explain", _explain, "say which codes a run's edit changed, and how far"
    )
    explain.add_argument("uri", metavar="URI", help="the run")


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

    for uri in args.uris:
        check_ended(uri)
    print(compare_runs(args.uris), end="")
    return OK


def _audit_sample(args: argparse.Namespace) -> int:
    from isic_ray.config.run import ModelConfig
    from isic_ray.models.registry import load_model
    from isic_ray.runs.run import Run
    from isic_ray.workflows.human_audit import LABELS, SHEET, sample_sheet

    check_ended(args.uri)
    run = Run.open(args.uri)
    model = load_model(ModelConfig(**run.record["config"]["model"]))
    directory = sample_sheet(run, model, args.to, args.n, args.seed)
    print(
        f"look at {directory}/{SHEET}, write unsafe or safe into {directory}/{LABELS}, then isic audit import"
    )
    return OK


def _audit_import(args: argparse.Namespace) -> int:
    from isic_ray.report.evidence import human_table
    from isic_ray.runs.run import Run
    from isic_ray.workflows.human_audit import import_labels

    check_ended(args.uri)
    run = Run.open(args.uri)
    found = import_labels(run, args.file)
    run.store.put("audit/human.json", json.dumps(found, indent=1, allow_nan=False).encode())
    print(human_table(found), end="")
    return OK


def _explain(args: argparse.Namespace) -> int:
    from isic_ray.config.run import ModelConfig
    from isic_ray.models.registry import read_spec
    from isic_ray.report.codebook_pictures import explain_run
    from isic_ray.report.evidence import explanation_table
    from isic_ray.runs.run import Run

    check_ended(args.uri)
    run = Run.open(args.uri)
    facts = read_spec(ModelConfig(**run.record["config"]["model"]))
    print(explanation_table(explain_run(run, facts.codebook, facts.normalised).facts), end="")
    return OK
