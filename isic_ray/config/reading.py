"""Strict checks of settings: YAML, types and values. Every failure is a UserError of one
sentence, naming the key.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import string
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from isic_ray.errors import UserError

TYPES = {  # how annotations are called in messages and documentation
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "list[str]": "list of texts",
    "dict[str, str]": "mapping of texts",
}
_EXAMPLES = {"list[str]": "[one, two]", "dict[str, str]": "{name: text}"}
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 takes 1e-3 for a text
_SHORT = reprlib.Repr()  # a message quotes no more than this of a value
_SHORT.maxstring = 60

# Values


def that(good: bool, key: str, value: object, what: str) -> None:
    """UserError "KEY is VALUE, but must be WHAT." unless ``good``."""
    if not good:
        raise UserError(f"{key} is {value!r}, but must be {what}.")


def choice(key: str, value: object, choices: Collection[str]) -> None:
    """UserError unless the value is one of the choices."""
    that(value in choices, key, value, f"one of {', '.join(choices)}")


def share(key: str, value: float) -> None:
    """UserError unless the value lies in [0, 1] (NaN does not)."""
    that(0 <= value <= 1, key, value, "from 0 to 1")


def least(key: str, value: float, lowest: int) -> None:
    """UserError unless the value is finite and at least ``lowest``."""
    that(lowest <= value < float("inf"), key, value, f"{lowest} or more")


def placeholders(key: str, text: str, known: Sequence[str], needed: Collection[str]) -> None:
    """UserError unless ``text`` is a `str.format` template of ``known`` names that uses at least
    one ``needed``.
    """
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError:
        found = {""}
    what = (
        f"a text with {' or '.join('{' + name + '}' for name in needed)} in it, and no braces but "
    )
    what += ", ".join("{" + name + "}" for name in known)
    that(found <= set(known) and bool(found & set(needed)), key, text, what)


# Types


def typed(key: str, annotation: str, value: Any, where: str = "") -> Any:
    """``value`` as the annotation says (whole numbers become floats where floats are wanted).

    Raises UserError naming key, expected type and what was found; ``where`` leads the message.
    """
    if annotation == "float" and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if annotation == "float" and type(value) is int:
        value = _to_float(value)
    if annotation == "dict[str, str]" and isinstance(value, dict):
        return {
            typed(f"{key} (a name)", "str", k, where): typed(f"{key}.{k}", "str", v, where)
            for k, v in value.items()
        }
    if annotation == "list[str]" and isinstance(value, list):
        return [typed(f"{key}[{index}]", "str", item, where) for index, item in enumerate(value)]
    if type(value).__name__ == annotation:
        return value
    wanted = TYPES[annotation] if annotation == "bool" else f"a {TYPES[annotation]}"
    example = f", such as {_EXAMPLES[annotation]};" if annotation in _EXAMPLES else ","
    raise UserError(f"{where}{key} must be {wanted}{example} found {_found(value)}.")


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _found(value: Any) -> str:
    names = {
        "str": "text",
        "int": "whole number",
        "float": "number",
        "bool": "truth value",
        "dict": "mapping",
    }
    return (
        "nothing"
        if value is None
        else f"the {names.get(type(value).__name__, type(value).__name__)} {_SHORT.repr(value)}"
    )


def closest(key: str, known: Sequence[str]) -> str:
    """The known dotted key that ``key`` most likely means: one of the same last name, or the
    most alike.
    """
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    alike = [name for name in known if name.count(".") == key.count(".")] or list(known)
    return difflib.get_close_matches(key, same or alike, n=1, cutoff=0)[0]


# YAML


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML libraries silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(name, yaml.ScalarNode) or name.value == "<<":
                continue
            if name.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name.value} is given twice", name.start_mark
                )
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file, local or at any fsspec URI. Raises UserError with the line
    where it is bad.
    """
    import fsspec

    try:
        with fsspec.open(str(path), "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: this is not UTF-8 text; save the file as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    tree = _parse(text, lambda line: f"{path}, line {line}: ")
    if tree is None:
        raise UserError(
            f"{path} is empty; give it sections such as model and prompts (`isic config` prints them all)."
        )
    if not isinstance(tree, dict):
        line = next(
            (
                n
                for n, row in enumerate(text.splitlines(), 1)
                if row.strip() and row.lstrip()[0] != "#"
            ),
            1,
        )
        raise UserError(
            f"{path}, line {line}: expected sections such as `model:`, found {_found(tree)}."
        )
    return {str(key): value for key, value in tree.items()}


def parse_value(text: str, annotation: str, where: str = "") -> Any:
    """A value given on the command line: YAML, but where text is wanted, what is no quoted text
    is taken as it is.
    """
    if annotation == "str" and not re.fullmatch(r"""\s*(".*"|'.*')\s*""", text, re.DOTALL):
        return text
    return _parse(text, lambda _: where)


def to_scalar(value: object) -> str:
    """A value in YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _parse(text: str, where: Callable[[int], str]) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        raise UserError(f"{where(mark.line + 1 if mark else 1)}bad YAML, {problem}.") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(
            f"{where(line)}bad YAML, the character {error.character!r} is not allowed."
        ) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = (
            "it is nested too deeply"
            if isinstance(error, RecursionError)
            else str(error).partition("\n")[0]
        )
        raise UserError(f"{where(1)}bad YAML, {reason}.") from error
