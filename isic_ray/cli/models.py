"""`isic models`, `isic doctor` and `isic convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isic_ray.cli.options import OK, Parser, add_command, add_config_option, add_set_option


def add(commands: Any) -> None:
    """Register the commands."""
    add_command(
        commands, "models", _models, "list the model families, what each can do and what it needs"
    )

    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        "check a checkpoint, from its files to a picture that is judged",
    )
    doctor.add_argument(
        "--model", required=True, metavar="NAME", help="a checkpoint directory or a hub name"
    )
    doctor.add_argument(
        "--judge", default="", metavar="NAME", help="who judges for it (judge.model)"
    )
    doctor.add_argument("--files-only", action="store_true", help="do not load the model")
    add_set_option(doctor)

    convert = add_command(
        commands, "convert", _convert, "turn published PyTorch files into safetensors, safely"
    )
    convert.add_argument(
        "file", metavar="FILE", help="vqgan.ckpt of Chameleon, or LlamaGen's t2i_….pt"
    )
    convert.add_argument(
        "--to", required=True, metavar="PATH", help="the .safetensors file, or LlamaGen's directory"
    )
    convert.add_argument("--vq", metavar="FILE", help="LlamaGen: vq_ds16_t2i.pt")
    convert.add_argument(
        "--text-encoder", metavar="DIR", help="LlamaGen: a directory of google/flan-t5-xl"
    )
    convert.add_argument(
        "--image-size", type=int, default=256, metavar="N", help="LlamaGen: 256 (default) or 512"
    )
    convert.add_argument(
        "--heads", type=int, default=0, metavar="N", help="LlamaGen: heads, for sizes not published"
    )
    _add_inputs(commands)


def _models(args: argparse.Namespace) -> int:
    from isic_ray.models.catalogue import REFUSED, known_families

    for family in known_families().values():
        skills = "draws, judges and rewrites" if family.judges else "draws"
        print(f"{family.name}")
        print(f"  does         {skills}")
        print(f"  pictures     {family.picture}")
        rows = "rows are normalised" if family.normalised else "rows are used as they are"
        print(f"  codebook     {rows}")
        again = "the same tokens are decoded again"
        if family.tokens_depend_on_codebook:
            again = "tokens are drawn again"
        print(f"  after edits  {again}")
        print(f"  checkpoints  {family.checkpoints}")
        if family.needs:
            print(f"  needs        {family.needs}")
    print("\nAny of them, or a vision-language model of transformers, can be judge.model. Refused:")
    for name, reason in REFUSED.items():
        print(f"  {name}: {reason}")
    return OK


def _doctor(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from isic_ray.config.run import load_config
    from isic_ray.models.doctor import examine

    config = replace(load_config(None, args.set).model, name=args.model)
    for what, found in examine(config, args.judge, load=not args.files_only):
        print(f"ok  {what:9} {found}", flush=True)
    return OK


def _convert(args: argparse.Namespace) -> int:
    from isic_ray.errors import UserError
    from isic_ray.models.conversion import convert_llamagen, read_published, write_safetensors

    to = Path(args.to)
    if args.vq or args.text_encoder:
        if not (args.vq and args.text_encoder):
            raise UserError("LlamaGen needs both --vq and --text-encoder")
        convert_llamagen(
            Path(args.file), Path(args.vq), Path(args.text_encoder), to, args.image_size, args.heads
        )
    elif to.suffix != ".safetensors":
        raise UserError(
            f"--to {args.to} must end with .safetensors (or give --vq and --text-encoder for "
            "LlamaGen)"
        )
    else:
        write_safetensors(read_published(Path(args.file)), to)
    print(f"{to}: written")
    return OK


if TYPE_CHECKING:
    from isic_ray.prompts.sets import PromptSet


def _add_inputs(commands: Any) -> None:
    """Register the commands."""
    prompts = add_command(commands, "prompts", _inspect, "look into prompt files").add_subparsers(
        metavar="inspect", required=True, parser_class=Parser
    )
    inspect = add_command(
        prompts, "inspect", _inspect, "rows, columns, duplicates, splits and categories of a file"
    )
    inspect.add_argument(
        "file", metavar="FILE", help="path or URI of a .csv, .jsonl or .parquet file"
    )

    config = add_command(
        commands, "config", _config, "print every setting with its type, value and meaning, as YAML"
    )
    add_config_option(config, required=False)
    add_set_option(config)
    add_command(
        commands, "version", _version, "print the versions of isic_ray and what it stands on"
    )


def _inspect(args: argparse.Namespace) -> int:
    from isic_ray.prompts.sets import inspect

    found = inspect(args.file)
    counts = f"{len(found.prompts):,} distinct prompts, {found.duplicates:,} duplicates"
    print(f"{args.file}: {found.rows:,} rows, {counts}")
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
    return (
        ", ".join(f"{name} ({meaning.get(name, 'not used')})" for name in found.columns) or "none"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _config(args: argparse.Namespace) -> int:
    from isic_ray.config.describe import to_yaml
    from isic_ray.config.run import load_config

    print("# Every setting of isic_ray. Keep what you change, and give the file to")
    print("# `isic run --config FILE`.\n")
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
