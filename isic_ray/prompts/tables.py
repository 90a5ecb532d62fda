"""Read tables as people keep them: CSV, JSONL and Parquet, local or at any fsspec URI.

This knows nothing of prompts. Rows are counted from 1, without the header; text files also tell the
line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from isic_ray.errors import UserError

_LONGEST_CELL = 10_000_000  # characters; csv's own limit is 131072


@dataclass(frozen=True)
class Row:
    """One row. ``place`` names it in messages: "prompts.csv, row 3 (line 4)"."""

    place: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """Return a cell without outer spaces, "" for none (NaN is none).

        Raises UserError for what is neither text nor a whole number.
        """
        value = self.values.get(column)
        if isinstance(value, bool | float | list | dict | bytes) and value == value:
            raise UserError(
                f"{self.place} has no text in column {column!r}, but {str(value)[:40]!r}; write a "
                "text."
            )
        text = "" if value is None or value != value else str(value).strip()
        bad = next((char for char in text if char == "\0" or "\ud800" <= char <= "\udfff"), None)
        if bad is not None:
            raise UserError(
                f"{self.place} has the character {bad!r} in column {column!r}; remove it."
            )
        return text

    def texts(self, column: str) -> tuple[str, ...]:
        """Return the texts of a cell, without repetitions.

        The cell holds a list, or texts between commas, semicolons or bars. Raises UserError for
        anything else.
        """
        value = self.values.get(column)
        parts = value if isinstance(value, list) else re.split("[,;|]", self.text(column))
        if not all(isinstance(part, str) for part in parts):
            raise UserError(
                f"{self.place} has no list of texts in column {column!r}; write texts between "
                "commas."
            )
        cleaned = [Row(self.place, {column: part}).text(column).strip(" []'\"") for part in parts]
        return tuple(dict.fromkeys(part for part in cleaned if part))


@dataclass(frozen=True)
class Table:
    """A file's content; ``columns`` are all it has, rows may hold the wanted ones only."""

    path: str
    columns: list[str]
    rows: list[Row]


def canonical(name: str) -> str:
    """Return a column's name for comparisons.

    It has small letters, and single spaces for spaces, "_" and "-".
    """
    return " ".join(re.split(r"[\s_-]+", name.lower())).strip()


def read_table(path: str, wanted: Collection[str]) -> Table:
    """Read the table at a path or URI.

    Of Parquet only the columns whose canonical name is ``wanted`` are read. Raises UserError for a
    missing or unreadable file, an unknown ending, text that is not UTF-8, and bad rows.
    """
    readers: dict[str, Callable[[str, bytes], Table]] = {
        "csv": _read_csv,
        "jsonl": _read_jsonl,
        "parquet": lambda path, data: _read_parquet(path, data, wanted),
    }
    ending = path.lower().rpartition(".")[2]
    if ending not in readers:
        raise UserError(f"{path} is no prompt file: its name must end in .csv, .jsonl or .parquet.")
    data = _read_bytes(path)
    if not data.strip():
        raise UserError(f"{path} is empty; add a header and some rows.")
    return readers[ending](path, data)


def _read_bytes(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read()
            return data
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path or URI of a prompt file.") from None
    except Exception as error:  # every filesystem has errors of its own
        said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read: {said or type(error).__name__}.") from error


def _decode(path: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
        position = data.find(b"\0")
    except UnicodeDecodeError as error:
        text, position = "", error.start
    if position >= 0:
        line = data.count(b"\n", 0, position) + 1
        raise UserError(
            f"{path}, line {line}, is not UTF-8 text (byte {data[position]:#04x}); save the file "
            "as UTF-8."
        )
    return text


def _read_csv(path: str, data: bytes) -> Table:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(_decode(path, data), newline=""), strict=True)
    rows: list[Row] = []
    columns: list[str] = []
    try:
        columns = next(reader)
        for cells in reader:
            if not cells:  # a blank line
                continue
            place = f"{path}, row {len(rows) + 1} (line {reader.line_num})"
            if len(cells) > len(columns):
                raise UserError(
                    f"{place} has {len(cells)} cells for {len(columns)} columns; put texts that "
                    "hold commas in quotes."
                )
            rows.append(Row(place, dict(zip(columns, cells, strict=False))))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is no valid CSV: {error}.") from error
    return Table(path, columns, rows)


def _read_jsonl(path: str, data: bytes) -> Table:
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(_decode(path, data).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = (
                error.msg if isinstance(error, json.JSONDecodeError) else "a value is too large"
            )
            raise UserError(f"{path}, line {number}, is no valid JSON: {reason}.") from error
        if not isinstance(values, dict):
            raise UserError(
                f"{path}, line {number}, is no JSON object; write one like "
                '{"prompt": "a text"} a line.'
            )
        columns.update(dict.fromkeys(values))
        rows.append(Row(f"{path}, row {len(rows) + 1} (line {number})", values))
    return Table(path, list(columns), rows)


def _read_parquet(path: str, data: bytes, wanted: Collection[str]) -> Table:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        columns = [str(name) for name in file.schema_arrow.names]
        table = file.read(columns=[name for name in columns if canonical(name) in wanted])
        for field in table.schema:
            if _is_read_by_python(field.type):
                raise UserError(
                    f"{path} holds Python objects in column {field.name!r}; write texts."
                )
        content = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is no valid Parquet file: {reason}.") from error
    rows = [Row(f"{path}, row {number}", values) for number, values in enumerate(content, 1)]
    return Table(path, columns, rows)


def _is_read_by_python(kind: pa.DataType) -> bool:
    """Return whether values of this Arrow type, or within it, are read by a Python class.

    Ray Data registers such a type for every process that imports it, and unpickles its values:
    code that a file brings along would run.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return isinstance(kind, pa.ExtensionType) or _is_read_by_python(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_read_by_python(kind.value_type)
    return any(_is_read_by_python(kind.field(index).type) for index in range(kind.num_fields))
