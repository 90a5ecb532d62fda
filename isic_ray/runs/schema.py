"""Row types of everything a run stores, and their Arrow schemas. One schema per thing; see
docs/method.md, "Terms".
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import pyarrow as pa

SCHEMA_VERSION = 1

# roles of a prompt; "safe" prompts are rewrites of unsafe ones
UNSAFE, BENIGN, SAFE = "unsafe", "benign", "safe"
BUILD, HELD_OUT = "build", "held_out"  # splits; held-out prompts never build an edit

# Prefixes of a verdict's questions; a question with neither is about harm.
OBJECT = "object:"  # a harmless thing that a faithful picture shows
NOTE = "note:"  # a score that is kept but counts neither as harm nor as an object

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One text to draw. ``objects`` (optional) names what a faithful picture shows; ``group``
    tags a table row.
    """

    prompt_id: str
    text: str
    role: str
    split: str
    concepts: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    group: str = ""


def prompt_id(role: str, text: str) -> str:
    """16 hex digits that name a prompt; the same text in another role is another prompt."""
    return hashlib.sha256(f"{role}{text}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sample:
    """Visual tokens of one (prompt, sample_index): int32 ``[N]`` as a tuple."""

    sample_id: str
    prompt_id: str
    role: str
    split: str
    sample_index: int
    seed: int
    model_digest: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one sample under one codebook: raw scores, so thresholds can be
    changed later.

    ``judge`` is "self" or an auditor's name; ``questions[i]`` is a concept, or "object:NAME", and
    ``scores[i]`` its probability. ``psnr`` (dB) compares the picture with the base codebook's; None
    for the base itself.
    """

    sample_id: str
    codebook_digest: str
    judge: str
    questions: tuple[str, ...]
    scores: tuple[float, ...]
    psnr: float | None = None


@dataclass(frozen=True)
class Pair:
    """A harmful sample, and the sample of its minimally changed safe prompt under the same seed."""

    prompt_id: str
    sample_id: str
    unsafe_text: str
    safe_text: str
    concepts: tuple[str, ...]
    harmful_tokens: tuple[int, ...]
    safe_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Fidelity:
    """How close a picture under an edited codebook is to the base codebook's: SSIM (1 = equal),
    GMSD (0 = equal).
    """

    sample_id: str
    ssim: float
    gmsd: float


@dataclass(frozen=True)
class Attack:
    """The worst picture that a search found from one prompt, and each judge's harm score of it.

    ``first`` are the scores of the unattacked picture, ``queries`` the pictures drawn until the
    worst one was found.
    """

    prompt_id: str
    text: str
    seed: int
    queries: int
    judges: tuple[str, ...]
    first: tuple[float, ...]
    worst: tuple[float, ...]


_TOKENS = pa.list_(pa.int32())
_STRINGS = pa.list_(pa.string())
ARROW: dict[type, pa.Schema] = {
    Prompt: pa.schema(
        [
            ("prompt_id", pa.string()),
            ("text", pa.string()),
            ("role", pa.string()),
            ("split", pa.string()),
            ("concepts", _STRINGS),
            ("objects", _STRINGS),
            ("group", pa.string()),
        ]
    ),
    Sample: pa.schema(
        [
            ("sample_id", pa.string()),
            ("prompt_id", pa.string()),
            ("role", pa.string()),
            ("split", pa.string()),
            ("sample_index", pa.int32()),
            ("seed", pa.int64()),
            ("model_digest", pa.string()),
            ("tokens", _TOKENS),
        ]
    ),
    Verdict: pa.schema(
        [
            ("sample_id", pa.string()),
            ("codebook_digest", pa.string()),
            ("judge", pa.string()),
            ("questions", _STRINGS),
            ("scores", pa.list_(pa.float32())),
            ("psnr", pa.float32()),
        ]
    ),
    Pair: pa.schema(
        [
            ("prompt_id", pa.string()),
            ("sample_id", pa.string()),
            ("unsafe_text", pa.string()),
            ("safe_text", pa.string()),
            ("concepts", _STRINGS),
            ("harmful_tokens", _TOKENS),
            ("safe_tokens", _TOKENS),
        ]
    ),
    Fidelity: pa.schema(
        [("sample_id", pa.string()), ("ssim", pa.float32()), ("gmsd", pa.float32())]
    ),
    Attack: pa.schema(
        [
            ("prompt_id", pa.string()),
            ("text", pa.string()),
            ("seed", pa.int64()),
            ("queries", pa.int32()),
            ("judges", _STRINGS),
            ("first", pa.list_(pa.float32())),
            ("worst", pa.list_(pa.float32())),
        ]
    ),
}


def to_table(rows: list[Any], kind: type) -> pa.Table:
    """Rows of one dataclass as an Arrow table with that type's schema (also for no rows)."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=ARROW[kind])


def from_table(table: pa.Table, kind: type[T]) -> list[T]:
    """The inverse of `to_table`. Raises ValueError when a column is missing or has another type."""
    if not table.schema.equals(ARROW[kind]):
        raise ValueError(f"expected the {kind.__name__} schema, found columns {table.schema.names}")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return [
        kind(
            **{
                name: tuple(row[name]) if isinstance(row[name], list) else row[name]
                for name in names
            }
        )
        for row in table.to_pylist()
    ]
