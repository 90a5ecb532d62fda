"""Read YAML strictly: no key given twice, and every error names the line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from isic_ray.config.section import found
from isic_ray.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML libraries silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(name, yaml.ScalarNode) or name.value == "<<":
                continue
            if name.value in seen:
                problem = f"{name.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path | str) -> dict[str, Any]:
    """Return the mapping in a YAML file, local or at any fsspec URI.

    Raises UserError, with the line where the file is bad.
    """
    import fsspec

    try:
        with fsspec.open(str(path), "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problem = "this is not UTF-8 text; save the file as UTF-8."
        raise UserError(f"{path}, line {line}: {problem}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    tree = _parse(text, lambda line: f"{path}, line {line}: ")
    if tree is None:
        what = "sections such as model and prompts (`isic config` prints them all)"
        raise UserError(f"{path} is empty; give it {what}.")
    if not isinstance(tree, dict):
        rows = enumerate(text.splitlines(), 1)
        line = next((n for n, row in rows if row.strip() and row.lstrip()[0] != "#"), 1)
        what = f"expected sections such as `model:`, found {found(tree)}"
        raise UserError(f"{path}, line {line}: {what}.")
    return {str(key): value for key, value in tree.items()}


def parse_value(text: str, kind: str, where: str = "") -> Any:
    """Return a value given on the command line, which is YAML.

    Where the kind is "text", only what stands in quotes is read as YAML.
    """
    if kind == "text" and not re.fullmatch(r"""\s*(".*"|'.*')\s*""", text, re.DOTALL):
        return text
    return _parse(text, lambda _: where)


def _parse(text: str, where: Callable[[int], str]) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = " ".join(str(error.problem or error.context).split())
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problem = f"the character {error.character!r} is not allowed"
    except RecursionError:
        line, problem = 1, "it is nested too deeply"
    except (ValueError, yaml.YAMLError) as error:
        line, problem = 1, str(error).partition("\n")[0]
    raise UserError(f"{where(line)}bad YAML, {problem}.")
