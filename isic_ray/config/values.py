"""The kinds of values that settings take."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, BeforeValidator, Field

_KINDS: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    list: "list of texts",
    dict: "mapping of texts",
}
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def kind_of(annotation: Any) -> str:
    """Return what messages and documentation call the values of a field, such as "number"."""
    kind = get_origin(annotation) or annotation
    return _KINDS[str if kind is Literal else kind]


def must_be(
    what: str,
    good: Callable[[Any], bool] = bool,
    when: type[AfterValidator] | type[BeforeValidator] = AfterValidator,
) -> AfterValidator | BeforeValidator:
    """Refuse a value that is not ``good``: "KEY is VALUE, but must be WHAT."."""

    def check(value: Any) -> Any:
        if not good(value):
            raise ValueError(what)
        return value

    return when(check)


def _read_exponent(value: Any) -> Any:
    """Return the number that YAML 1.1 takes for a text, such as 1e-3; other values as they are."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


Number = Annotated[float, BeforeValidator(_read_exponent)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
PositiveShare = Annotated[Number, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=0)]
OneOrMore = Annotated[int, Field(ge=1)]
ZeroStage = Annotated[int, must_be("0, 1, 2 or 3", range(4).__contains__)]
