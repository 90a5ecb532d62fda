"""The fingerprint: what makes two configurations the same."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from isic_ray.config.run import EditConfig, ExecutionConfig, JudgeConfig, RunConfig
from isic_ray.runs.records import fingerprint


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return (
        {**value, "x": "y"}
        if isinstance(value, dict)
        else [*value, "x"]
        if isinstance(value, list)
        else value + "x"
    )


def test_fingerprint_changes_with_every_field_but_execution() -> None:
    base = RunConfig()
    seen = {fingerprint(base)}
    for section in dataclasses.fields(RunConfig):
        part = getattr(base, section.name)
        for option in dataclasses.fields(part):
            varied = copy.copy(part)
            # any value, allowed or not
            object.__setattr__(varied, option.name, changed(getattr(part, option.name)))
            other = replace(base, **{section.name: varied})
            if section.name == "execution":
                assert fingerprint(other) in seen
            else:
                assert fingerprint(other) not in seen, option.name
                seen.add(fingerprint(other))


def test_fingerprint_is_canonical() -> None:
    assert fingerprint(RunConfig()) == fingerprint(RunConfig())
    assert len(fingerprint(RunConfig())) == 64
    whole, spelt = EditConfig(strength=1), EditConfig(strength=1.0)
    assert fingerprint(RunConfig(edit=whole)) == fingerprint(RunConfig(edit=spelt))
    one, two = (
        JudgeConfig(questions={"a": "x", "b": "y"}),
        JudgeConfig(questions={"b": "y", "a": "x"}),
    )
    assert fingerprint(RunConfig(judge=one)) == fingerprint(RunConfig(judge=two))
    assert fingerprint(Odd(1)) != fingerprint(Odd(True))  # which no section takes for the other


@dataclass
class Odd:
    value: Any
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, {1, 2}, b"x", object(), {1: "x"}, [{"a": math.nan}], int, 1j]
)
def test_fingerprint_refuses_what_has_no_canonical_form(value: Any) -> None:
    with pytest.raises(TypeError, match=r"config\.value.* has no canonical form"):
        fingerprint(Odd(value))
    fingerprint(Odd("fine"))
