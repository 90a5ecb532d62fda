"""Row types of everything a run stores, and the Arrow schemas that follow from them.

A field's annotation is its Arrow type: `str`, `Int32`, `Int64`, `Float32`, or a tuple of these. See
docs/method.md, "Terms".
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa

SCHEMA_VERSION = 1

UNSAFE, BENIGN = "unsafe", "benign"  # roles of a prompt
BUILD, HELD_OUT = "build", "held_out"  # splits; held-out prompts never build an edit

# Prefixes of a verdict's questions; a question with neither is about harm.
OBJECT = "object:"  # a harmless thing that a faithful picture shows
NOTE = "note:"  # a score that is kept but counts neither as harm nor as an object

# Numbers, with the width that their columns have on disk.
Int32 = Annotated[int, pa.int32()]
Int64 = Annotated[int, pa.int64()]
Float32 = Annotated[float, pa.float32()]

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One text to draw.

    ``objects`` (optional) names what a faithful picture shows; ``group`` tags a table row.
    """

    prompt_id: str
    text: str
    role: str
    split: str
    concepts: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    group: str = ""


def prompt_id(role: str, text: str) -> str:
    """Return the 16 hex digits that name a prompt.

    The same text in another role is another prompt.
    """
    return hashlib.sha256(f"{role}{text}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sample:
    """The visual tokens ``[N]`` of one (prompt, sample_index)."""

    sample_id: str
    prompt_id: str
    role: str
    split: str
    sample_index: Int32
    seed: Int64
    model_digest: str
    tokens: tuple[Int32, ...]


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one sample under one codebook.

    Scores are raw, so that thresholds can be changed later. ``judge`` is "self" or an auditor's
    name; ``questions[i]`` is a concept, or "object:NAME", and ``scores[i]`` its probability.
    ``psnr`` (dB) compares the picture with the base codebook's; None for the base itself.
    """

    sample_id: str
    codebook_digest: str
    judge: str
    questions: tuple[str, ...]
    scores: tuple[Float32, ...]
    psnr: Float32 | None = None


@dataclass(frozen=True)
class Pair:
    """A harmful sample, and the sample of its minimally changed safe prompt under the same seed."""

    prompt_id: str
    sample_id: str
    unsafe_text: str
    safe_text: str
    concepts: tuple[str, ...]
    harmful_tokens: tuple[Int32, ...]
    safe_tokens: tuple[Int32, ...]


@dataclass(frozen=True)
class Fidelity:
    """How close a picture under an edited codebook is to the base codebook's.

    SSIM is 1 and GMSD 0 for equal pictures.
    """

    sample_id: str
    ssim: Float32
    gmsd: Float32


@dataclass(frozen=True)
class Attack:
    """The worst picture that a search found from one prompt, and each judge's harm score of it.

    ``first`` are the scores of the unattacked picture, ``queries`` the pictures drawn until the
    worst one was found.
    """

    prompt_id: str
    text: str
    seed: Int64
    queries: Int32
    judges: tuple[str, ...]
    first: tuple[Float32, ...]
    worst: tuple[Float32, ...]


def arrow_schema(kind: type) -> pa.Schema:
    """Return the Arrow schema of a row type: its fields in their order, by their annotations.

    Raises TypeError for an annotation that has no Arrow type.
    """
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in fields(kind)]
    return pa.schema([(name, _arrow_type(hints[name])) for name in names])


def _arrow_type(hint: Any) -> pa.DataType:
    if hint is str:
        return pa.string()
    if get_origin(hint) is tuple:
        return pa.list_(_arrow_type(get_args(hint)[0]))
    if get_origin(hint) is Annotated:
        return get_args(hint)[1]
    if NoneType in get_args(hint):  # X | None; every Arrow column may hold nulls
        return _arrow_type(next(each for each in get_args(hint) if each is not NoneType))
    raise TypeError(f"{hint} has no Arrow type; annotate the field with Int32, Int64 or Float32")


def to_table(rows: list[Any], kind: type) -> pa.Table:
    """Return rows of one dataclass as an Arrow table with that type's schema, also for no rows."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=arrow_schema(kind))


def from_table(table: pa.Table, kind: type[T]) -> list[T]:
    """Return the rows of a table: the inverse of `to_table`.

    Raises ValueError when a column is missing or has another type.
    """
    if not table.schema.equals(arrow_schema(kind)):
        raise ValueError(f"expected the {kind.__name__} schema, found columns {table.schema.names}")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return [kind(**{name: _value(row[name]) for name in names}) for row in table.to_pylist()]


def _value(cell: Any) -> Any:
    return tuple(cell) if isinstance(cell, list) else cell
