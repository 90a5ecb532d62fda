"""What lies on disk: the columns of every row type, in their order, with their types."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest

from isic_ray.runs.schema import (
    Attack,
    Fidelity,
    Pair,
    Prompt,
    Sample,
    Verdict,
    arrow_schema,
    from_table,
    to_table,
)

COLUMNS = {
    Prompt: (
        "prompt_id: string, text: string, role: string, split: string, "
        "concepts: list<item: string>, objects: list<item: string>, group: string"
    ),
    Sample: (
        "sample_id: string, prompt_id: string, role: string, split: string, sample_index: int32, "
        "seed: int64, model_digest: string, tokens: list<item: int32>"
    ),
    Verdict: (
        "sample_id: string, codebook_digest: string, judge: string, "
        "questions: list<item: string>, scores: list<item: float>, psnr: float"
    ),
    Pair: (
        "prompt_id: string, sample_id: string, unsafe_text: string, safe_text: string, "
        "concepts: list<item: string>, harmful_tokens: list<item: int32>, "
        "safe_tokens: list<item: int32>"
    ),
    Fidelity: "sample_id: string, ssim: float, gmsd: float",
    Attack: (
        "prompt_id: string, text: string, seed: int64, queries: int32, "
        "judges: list<item: string>, first: list<item: float>, worst: list<item: float>"
    ),
}
FINGERPRINT = "3a0ca20212bcde461b1af8f35bdc99ab35b4d8b09fffd7d25603ffc882188575"


def columns(kind: type) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in arrow_schema(kind))


@pytest.mark.parametrize("kind", COLUMNS, ids=lambda kind: kind.__name__)
def test_columns_are_the_stored_ones(kind: type) -> None:
    assert columns(kind) == COLUMNS[kind]
    assert all(field.nullable for field in arrow_schema(kind))
    assert arrow_schema(kind).metadata is None


def test_fingerprint_of_all_row_types() -> None:
    """Runs on disk hold exactly these columns: with other ones, raise `SCHEMA_VERSION`."""
    lines = [f"{kind.__name__}: {columns(kind)}" for kind in COLUMNS]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == FINGERPRINT


@dataclass
class Odd:
    count: int


def test_a_number_without_a_width_is_refused() -> None:
    with pytest.raises(TypeError, match="Int32, Int64 or Float32"):
        arrow_schema(Odd)


def test_another_kinds_table_is_refused() -> None:
    table = to_table([Fidelity("p0/0", 1.0, 0.0)], Fidelity)
    assert from_table(table, Fidelity) == [Fidelity("p0/0", 1.0, 0.0)]
    for wrong in (table.drop_columns(["gmsd"]), to_table([], Prompt)):
        with pytest.raises(ValueError, match="expected the Fidelity schema"):
            from_table(wrong, Fidelity)
