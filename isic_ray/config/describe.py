"""Describe settings for people: each with its type, value and meaning."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, NamedTuple

import yaml

from isic_ray.config.run import RunConfig
from isic_ray.config.section import fields_in
from isic_ray.config.values import kind_of

_WIDTH = 100


class Setting(NamedTuple):
    """One key as the documentation shows it; ``type`` is a word such as "number"."""

    key: str
    type: str
    default: Any
    doc: str


def describe() -> list[Setting]:
    """Return every key with its type, default and meaning, in order."""
    defaults = RunConfig()
    return [
        Setting(
            f"{section.name}.{name}",
            kind_of(found.annotation),
            getattr(part, name),
            " ".join((found.description or "").split()),
        )
        for section in dataclasses.fields(RunConfig)
        for part in [getattr(defaults, section.name)]
        for name, found in fields_in(part).items()
    ]


def to_yaml(config: RunConfig | None = None) -> str:
    """Return the configuration (default: all defaults) as YAML that says what each key means.

    A line has at most 100 characters, unless a value has very long words.
    """
    config = config or RunConfig()
    known = {setting.key: setting for setting in describe()}
    lines: list[str] = []
    for section, values in dataclasses.asdict(config).items():
        lines += ["", f"{section}:  # {getattr(config, section).__doc__}"]
        for name, value in values.items():
            setting = known[f"{section}.{name}"]
            note = f"  # {setting.type}. {setting.doc}"
            entry = _entry(name, value)
            if len(entry) == 1 and len(entry[0] + note) <= _WIDTH:
                lines.append(entry[0] + note)
            else:
                lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  # ") + entry
    return "\n".join(lines[1:]) + "\n"


def _entry(name: str, value: Any) -> list[str]:
    """Return the lines of ``name: value`` below a section: lists on one line, mappings on many."""
    text = yaml.safe_dump(
        {name: value},
        default_flow_style=None if isinstance(value, list) else False,
        width=80,  # a line ends with the word that passes it
        allow_unicode=True,
        sort_keys=False,
    )
    return textwrap.indent(text, "  ").splitlines()
