"""`isic retrain`: retrain a codebook in the harmless space on a set of pictures."""

from __future__ import annotations

import argparse
from typing import Any

from isic_ray.commands.options import OK, add_command


def add(commands: Any) -> None:
    """Register the command."""
    retrain = add_command(commands, "retrain", _retrain, "retrain a run's codebook in the harmless space on pictures")
    retrain.add_argument("--run", required=True, metavar="URI", help="a run that has ended: its model and codebook")
    text = "folder of pictures, or of Parquet files or WebDataset tars that hold them"
    retrain.add_argument("--pictures", required=True, metavar="URI", help=text)
    retrain.add_argument("--out", required=True, metavar="URI", help="directory or s3://BUCKET/PREFIX of the training")
    text = "change a setting, such as steps=5000 or workers=8 (see isic_ray/retrain_config.py)"
    retrain.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=text)
    retrain.add_argument("--verbose", action="store_true", help="also show what Ray and the libraries say")


def _retrain(args: argparse.Namespace) -> int:
    from isic_ray.execution.retrain import retrain
    from isic_ray.retrain_config import retrain_config

    result = retrain(retrain_config(args.run, args.pictures, args.set), args.out, verbose=args.verbose)
    before, after = result["before"]["evaluation_loss"], result["after"]["evaluation_loss"]
    print(
        f"reconstruction loss on pictures set aside: {before:.4f} before, {after:.4f} after {result['steps']:,} steps"
    )
    print(f"largest component in the harmful space: {result['largest_harmful_component']:.1e}")
    print(f"codebook: {args.out.rstrip('/')}/{result['safe_codebook']}")
    return OK
