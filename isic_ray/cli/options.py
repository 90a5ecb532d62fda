"""What the command modules share: exit codes, the parser, and options that mean the same
everywhere.

A command module has one function ``add(commands)``, which registers its commands;
`isic_ray.cli.main` lists the modules.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from isic_ray.config.run import RunConfig

OK, PROBLEM, USER_ERROR, STOPPED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the program does."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"isic: {message}; see {self.prog} --help\n")


def add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(command=function)
    return parser


def add_config_option(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="a YAML file, or a recipe: demo, janus-pro-1b, emu3 …",
    )


def add_set_option(parser: argparse.ArgumentParser) -> None:
    text = "change a setting, such as edit.strength=0.5 (see `isic config`); may be given often"
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=text
    )


def add_run_options(parser: argparse.ArgumentParser, out: str) -> None:
    add_set_option(parser)
    parser.add_argument("--out", metavar="URI", help=out)
    parser.add_argument(
        "--verbose", action="store_true", help="also show what Ray and the libraries say"
    )


def configuration(args: argparse.Namespace) -> tuple[RunConfig, str]:
    """The configuration, and where the run is stored."""
    from isic_ray.config.run import load_config

    return load_config(args.config, args.set), args.out or f"runs/{Path(args.config).stem}"
