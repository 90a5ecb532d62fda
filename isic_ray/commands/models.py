"""`isic models`, `isic doctor` and `isic convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from isic_ray.commands.options import OK, add_command, add_set_option


def add(commands: Any) -> None:
    """Register the commands."""
    add_command(commands, "models", _models, "list the model families, what each can do and what it needs")

    doctor = add_command(commands, "doctor", _doctor, "check a checkpoint, from its files to a picture that is judged")
    doctor.add_argument("--model", required=True, metavar="NAME", help="a checkpoint directory or a hub name")
    doctor.add_argument("--judge", default="", metavar="NAME", help="who judges for it (judge.model)")
    doctor.add_argument("--files-only", action="store_true", help="do not load the model")
    add_set_option(doctor)

    convert = add_command(commands, "convert", _convert, "turn published PyTorch files into safetensors, safely")
    convert.add_argument("file", metavar="FILE", help="vqgan.ckpt of Chameleon, or LlamaGen's t2i_….pt")
    convert.add_argument("--to", required=True, metavar="PATH", help="the .safetensors file, or LlamaGen's directory")
    convert.add_argument("--vq", metavar="FILE", help="LlamaGen: vq_ds16_t2i.pt")
    convert.add_argument("--text-encoder", metavar="DIR", help="LlamaGen: a directory of google/flan-t5-xl")
    convert.add_argument("--image-size", type=int, default=256, metavar="N", help="LlamaGen: 256 (default) or 512")
    convert.add_argument("--heads", type=int, default=0, metavar="N", help="LlamaGen: heads, for sizes not published")


def _models(args: argparse.Namespace) -> int:
    from isic_ray.models.registry import REFUSED, known_families

    for family in known_families().values():
        skills = "draws, judges and rewrites" if family.judges else "draws"
        print(f"{family.name}")
        print(f"  does         {skills}")
        print(f"  pictures     {family.picture}")
        print(f"  codebook     {'rows are normalised' if family.normalised else 'rows are used as they are'}")
        anew = "tokens are drawn anew" if family.tokens_depend_on_codebook else "the same tokens are decoded anew"
        print(f"  after edits  {anew}")
        print(f"  checkpoints  {family.checkpoints}")
        if family.needs:
            print(f"  needs        {family.needs}")
    print("\nAny of them, or a vision-language model of transformers, can be judge.model. Refused:")
    for name, reason in REFUSED.items():
        print(f"  {name}: {reason}")
    return OK


def _doctor(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from isic_ray.config import load_config
    from isic_ray.doctor import examine

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
        convert_llamagen(Path(args.file), Path(args.vq), Path(args.text_encoder), to, args.image_size, args.heads)
    elif to.suffix != ".safetensors":
        raise UserError(f"--to {args.to} must end with .safetensors (or give --vq and --text-encoder for LlamaGen)")
    else:
        write_safetensors(read_published(Path(args.file)), to)
    print(f"{to}: written")
    return OK
