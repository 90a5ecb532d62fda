"""`isic prompts inspect`, `isic config` and `isic version`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from isic_ray.commands.options import OK, Parser, add_command, add_config_option, add_set_option

if TYPE_CHECKING:
    from isic_ray.prompts import PromptSet


def add(commands: Any) -> None:
    """Register the commands."""
    prompts = add_command(commands, "prompts", _inspect, "look into prompt files").add_subparsers(
        metavar="inspect", required=True, parser_class=Parser
    )
    inspect = add_command(prompts, "inspect", _inspect, "rows, columns, duplicates, splits and categories of a file")
    inspect.add_argument("file", metavar="FILE", help="path or URI of a .csv, .jsonl or .parquet file")

    config = add_command(commands, "config", _config, "print every setting with its type, value and meaning, as YAML")
    add_config_option(config, required=False)
    add_set_option(config)
    add_command(commands, "version", _version, "print the versions of isic_ray and what it stands on")


def _inspect(args: argparse.Namespace) -> int:
    from isic_ray.prompts import inspect

    found = inspect(args.file)
    print(f"{args.file}: {found.rows:,} rows, {len(found.prompts):,} distinct prompts, {found.duplicates:,} duplicates")
    if found.known_as:
        name, rows = found.known_as
        whole = f" ({rows:,} rows when whole)" if rows else ""
        print(f"set         has the columns of {name}{whole}")
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
