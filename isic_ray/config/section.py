"""Sections of settings: strict, frozen, and refusing in one sentence what does not fit."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast, dataclass_transform

import pydantic.dataclasses
from pydantic import ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from isic_ray.errors import UserError

Class = TypeVar("Class", bound=type)

_STRICT = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)

_UNKNOWN = "unexpected_keyword_argument"
_WANTED = {  # by pydantic's name of the error
    "string_type": "a text,",
    "int_type": "a whole number,",
    "float_type": "a number,",
    "bool_type": "true or false,",
    "list_type": "a list of texts, such as [one, two];",
    "dict_type": "a mapping of texts, such as {name: text};",
    "dataclass_exact_type": "a section,",
}
_RANGES = {  # by the bounds of a number
    ("ge", "le"): "from {ge} to {le}",
    ("gt", "le"): "above {gt} and at most {le}",
    ("gt", "lt"): "between {gt} and {lt}",
    ("ge",): "{ge} or more",
    ("gt",): "above {gt}",
    (): "a finite number",
}
_NAMES = dict(str="text", int="whole number", float="number", bool="truth value", dict="mapping")
_SHORT = reprlib.Repr()  # a message quotes no more than this of a value of the wrong type
_SHORT.maxstring = 60


class SettingError(UserError):
    """An unknown key or a wrong type; ``setting`` is the dotted name of what is refused."""

    def __init__(self, sentence: str, setting: str = "") -> None:
        super().__init__(sentence)
        self.setting = setting


@contextmanager
def written_in(places: Mapping[str, str], otherwise: str = "") -> Iterator[None]:
    """Lead the sentence of a SettingError with the place that the setting was written in."""
    try:
        yield
    except SettingError as error:
        raise UserError(f"{places.get(error.setting, otherwise)}{error}") from None


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def settings(section: str) -> Callable[[Class], Class]:
    """Make a class a frozen pydantic dataclass whose docstrings under the fields are their docs.

    It takes no unknown key, no value of another type and no NaN, and raises UserErrors that name
    ``section.key``, or ``key`` where the section is "".
    """
    prefix = f"{section}." if section else ""

    def decorate(plain: Class) -> Class:
        made: Any = pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)(plain)
        init = made.__init__

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **values: Any) -> None:
            try:
                init(self, *args, **values)
            except ValidationError as error:
                raise _user_error(error, prefix, fields_in(made)) from None

        made.__init__ = __init__
        return cast(Class, made)

    return decorate


def fields_in(made: Any) -> dict[str, FieldInfo]:
    """Return the fields of a pydantic dataclass by name."""
    fields: dict[str, FieldInfo] = made.__pydantic_fields__
    return fields


def unknown_key(key: str, known: Sequence[str]) -> SettingError:
    """Return the error for a key that is not among the ``known`` ones."""
    return SettingError(f"unknown key {key}; did you mean {closest(key, known)}?", key)


def closest(key: str, known: Sequence[str]) -> str:
    """Return the known dotted key that is meant: one of the same last name, or the most alike."""
    same = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    alike = [name for name in known if name.count(".") == key.count(".")] or known
    return difflib.get_close_matches(key, same or alike, n=1, cutoff=0)[0]


def found(value: object) -> str:
    """Return a value with its type, as in "found the text 'two'"."""
    name = type(value).__name__
    return "nothing" if value is None else f"the {_NAMES.get(name, name)} {_SHORT.repr(value)}"


def _user_error(error: ValidationError, prefix: str, fields: dict[str, FieldInfo]) -> UserError:
    """Return the error for the first thing that is wrong; an unknown key comes first."""
    first = min(error.errors(), key=lambda each: each["type"] != _UNKNOWN)
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    name, *inner = first["loc"]
    setting = f"{prefix}{name}"
    if kind == _UNKNOWN:
        return unknown_key(setting, [f"{prefix}{known}" for known in fields])
    if kind == "missing":
        return SettingError(f"{setting} is missing; give it a value.", setting)
    if name not in fields:  # given by position
        return SettingError(f"{setting}: {first['msg']}.", setting)

    key = setting + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
    if inner[-1:] == ["[key]"]:
        key = f"{setting} (a name)"
    if kind == "literal_error":
        kind = "choice" if isinstance(value, str) else "string_type"
    if kind in _WANTED:
        return SettingError(f"{key} must be {_WANTED[kind]} found {found(value)}.", setting)

    if kind == "choice":
        what = "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    elif kind == "value_error":
        what = str(context["error"])
    else:
        field = fields[str(name)]
        what = _range(field)
        value = float(value) if field.annotation is float else value
    return UserError(f"{key} is {value!r}, but must be {what}.")


def _range(field: FieldInfo) -> str:
    bounds = {
        name: getattr(limit, name)
        for limit in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(limit, name)
    }
    return _RANGES[tuple(bounds)].format(**bounds)
