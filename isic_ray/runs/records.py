"""Seal and read the records of a run: canonical JSON, and pages, that carry their own digest.

Here is also what makes two configurations the same: `fingerprint` and `differences`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

from isic_ray.errors import UserError

Record = dict[str, Any]

SEAL = "record_sha256"  # the key of a record's own digest
_PAGE_SEAL = b"\n<!-- sha256 %s -->\n"
# Keys of `run.json` that must agree on resume, besides the fingerprint: inputs that the
# configuration only names.
PINNED = ("model_digest", "judge_digest", "prompts_digest")


class Damaged(UserError):
    """A stored object is missing, or is not what was committed."""


def fingerprint(config: Any) -> str:
    """Return the SHA-256, in hex, of a configuration dataclass without its `execution` section.

    It is independent of the order of keys and of 1 against 1.0. Raises TypeError for what has no
    canonical form (NaN, infinity, sets, objects), naming the field.
    """
    canonical = _canonical(config, "config")
    canonical.pop("execution", None)
    return sha256_of(_json(canonical))


def differences(asked: Record, found: Record) -> list[str]:
    """Return a line like "edit.rank: 2 here, 3 in the run" for all that forbids resuming.

    ``asked`` and ``found`` are records like run.json; [] when the run may be resumed.
    """
    pinned = {
        key: asked[key] for key in PINNED if key in asked and asked[key] != found.get(key, "")
    }
    lines = [f"{key}: {value} here, {found.get(key)} in the run" for key, value in pinned.items()]
    if asked["fingerprint"] == found.get("fingerprint"):
        return lines
    ours, theirs = dict(_flat(asked.get("config", {}))), dict(_flat(found.get("config", {})))
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name, "absent"), theirs.get(name, "absent")
        if mine != other and not name.startswith("execution."):
            lines.append(f"{name}: {mine!r} here, {other!r} in the run")
    return lines or ["the fingerprints differ: another version of isic_ray wrote it"]


def _flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield name, list(tree) if isinstance(tree, tuple) else tree  # JSON knows no tuples
        return
    for key, value in tree.items():
        yield from _flat(value, f"{name}.{key}" if name else str(key))


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of ``data``, in hex."""
    return hashlib.sha256(data).hexdigest()


def seal(record: Record, indent: int | None = None) -> bytes:
    """Return the record as JSON with its own digest, so that a flipped bit shows.

    Raises ValueError for NaN and infinity.
    """
    content = {name: value for name, value in record.items() if name != SEAL}
    sealed = {**content, SEAL: sha256_of(_json(as_json(content)))}
    if indent is None:
        return _json(sealed)
    return json.dumps(sealed, indent=indent, allow_nan=False).encode()


def as_json(value: Record) -> Record:
    """Return the record as it will be read: tuples as lists, integer keys as strings.

    Raises TypeError or ValueError for what JSON lacks.
    """
    read: Record = json.loads(_json(value))
    return read


def unseal(data: bytes, where: str) -> Record:
    """Return the record that `seal` wrote, without its digest.

    ``where`` names it in the message. Raises `Damaged` for all but what `seal` wrote.
    """
    record = parse_object(data, where)
    try:
        whole = record.pop(SEAL, None) == sha256_of(_json(record))
    except ValueError:  # NaN, which json reads although `seal` never writes it
        whole = False
    if not whole:
        raise Damaged(f"{where} is damaged (its content does not match its digest).")
    return record


def seal_page(page: str) -> bytes:
    """Return an HTML page with its digest in a comment at its end."""
    data = page.encode()
    return data + _PAGE_SEAL % sha256_of(data).encode()


def page_is_whole(data: bytes) -> bool:
    """Return whether a page is what `seal_page` made."""
    size = len(_PAGE_SEAL % (b"0" * 64))
    return data[-size:] == _PAGE_SEAL % sha256_of(data[:-size]).encode()


def json_or_repr(value: Any) -> Any:
    """Return the value as JSON knows it, or its repr."""
    try:
        return json.loads(_json(value))
    except (TypeError, ValueError):
        return repr(value)


def parse_object(data: bytes, where: str) -> Record:
    """Parse a JSON object. Raises `Damaged` for anything else."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise Damaged(f"{where} is damaged (not a JSON object).")
    return record


def _canonical(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _canonical(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
        }
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _canonical(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else float(value)
    if value is None or type(value) in (bool, int, str):
        return value
    raise TypeError(f"{where}: {value!r} has no canonical form")
