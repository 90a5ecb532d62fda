"""`isic sweep`: search the method's settings with Ray Tune."""

from __future__ import annotations

import argparse
from typing import Any

from isic_ray.commands.options import OK, PROBLEM, add_command


def add(commands: Any) -> None:
    """Register the command."""
    sweep = add_command(commands, "sweep", _sweep, "search the method's settings, all trials on the same pictures")
    text = "a YAML file or URI, or a shipped sweep: demo"
    sweep.add_argument("--config", required=True, metavar="FILE", help=text)
    sweep.add_argument("--out", required=True, metavar="URI", help="directory or s3://BUCKET/PREFIX of the sweep")
    sweep.add_argument("--verbose", action="store_true", help="also show what Ray and the libraries say")


def _sweep(args: argparse.Namespace) -> int:
    from isic_ray.execution.sweep import run_sweep
    from isic_ray.sweep_config import load_sweep
    from isic_ray.sweep_report import sweep_table

    result = run_sweep(load_sweep(args.config), args.out, verbose=args.verbose)
    print(sweep_table(result))
    print(f"the chosen settings, for `isic run --config`: {args.out.rstrip('/')}/best.yaml")
    return PROBLEM if any(trial["status"] == "failed" for trial in result["trials"]) else OK
