"""SafeCodebook: the one file that makes a stock model safer, and takes the change back bit for bit.

The file is safetensors: the indices of the changed rows, their values before and after (float32),
and one JSON record.

Digests and precisions. A table is named by the SHA-256 of its float32 upcast (`table_digest`), so a
checkpoint has one name whether its bfloat16 table is loaded as bfloat16 or as float32. An edit is
built on the float32 master, though, and a user may load the same checkpoint in half precision.
Since rounding is a function of the table alone, the file also carries the digests of both tables
*as rounded to bfloat16 and float16*. Applying finds which rounding of the base the model holds,
writes the new rows under the same rounding, and checks the result against the digest of the edited
table under that rounding, so every outcome is exact. A table rounded in any other way is refused as
another base.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from isic_ray.errors import UserError

SCHEMA_VERSION = 1
MAX_HEADER_BYTES = (
    1 << 20
)  # a real header has a few kB; a larger one is not ours or is an attack on the JSON parser
_RECORD = "isic_ray"  # the key of our JSON in safetensors' metadata
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Where known checkpoints keep their VQ table, seen from the top object or from the model inside it.
_TABLE_PATHS = (
    "model.vqmodel.quantize.embedding",
    "vqmodel.quantize.embedding",
    "quantize.embedding",
)

M = TypeVar("M")


@runtime_checkable
class CodebookHolder(Protocol):
    """An adapter whose table is the attribute ``codebook`` ``[K,d]``. It is replaced by a new
    tensor, never written.
    """

    codebook: Tensor


def table_digest(codebook: Tensor) -> str:
    """SHA-256 hex of a table ``[K,d]``: dtype name, shape and little-endian bytes of its float32
    upcast.

    Raises UserError for dtypes other than float32, bfloat16 and float16, and for tables without
    data (meta device).
    """
    if codebook.dtype not in _PRECISIONS.values() or codebook.dim() != 2 or codebook.is_meta:
        raise UserError(
            f"The codebook is a {codebook.dtype} tensor of shape {list(codebook.shape)} on {codebook.device}, but must "
            "be a loaded [rows, width] table in float32, bfloat16 or float16."
        )
    table = codebook.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(f"float32 {list(table.shape)} ".encode())
    digest.update(table.numpy().data.cast("B") if table.numel() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class ArtifactMeta:
    """Where an edit comes from. ``notes`` holds JSON types only (settings, rates, digests of the
    run).
    """

    method: str
    family: str
    round: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SafeCodebook:
    """An edit of one base table. Make it with `from_tables`, `load` or `from_bytes`."""

    shape: tuple[int, int]  # (K, d)
    rows: Tensor  # [M] int64, ascending: the changed rows
    base_rows: Tensor  # [M,d] float32, before
    edited_rows: Tensor  # [M,d] float32, after
    base_digests: dict[str, str]  # precision -> digest of the base table as rounded to it
    edited_digests: dict[str, str]  # ... of the edited table
    meta: ArtifactMeta

    @property
    def base_digest(self) -> str:
        """`table_digest` of the float32 base table."""
        return self.base_digests["float32"]

    @property
    def edited_digest(self) -> str:
        """`table_digest` of the float32 edited table."""
        return self.edited_digests["float32"]

    @classmethod
    def from_tables(cls, base: Tensor, edited: Tensor, meta: ArtifactMeta) -> SafeCodebook:
        """The difference between two tables ``[K,d]``. UserError for unlike shapes, non-finite
        rows, non-JSON notes.
        """
        if base.shape != edited.shape:
            raise UserError(
                f"The base table has shape {list(base.shape)}, but the edited one {list(edited.shape)}."
            )
        base_digests, edited_digests = _digests(base), _digests(edited)
        base, edited = (
            table.detach().to("cpu", torch.float32).contiguous() for table in (base, edited)
        )
        # Bits are compared, not values: -0.0 and 0.0 are equal but not the same file.
        changed = (
            (base.view(torch.int32) != edited.view(torch.int32)).any(dim=1).nonzero().flatten()
        )
        if not edited[changed].isfinite().all():
            raise UserError(
                "The edited codebook holds values that are not finite, so the fine-tune has diverged."
            )
        try:
            notes = json.loads(json.dumps(meta.notes, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"The notes of a safe codebook must be JSON: {error}.") from error
        meta = ArtifactMeta(meta.method, meta.family, meta.round, notes)
        shape = (base.shape[0], base.shape[1])
        return cls(
            shape, changed, base[changed], edited[changed], base_digests, edited_digests, meta
        )

    def apply_to(self, base: Tensor) -> Tensor:
        """The edited table ``[K,d]`` as a new tensor with the dtype and device of ``base``
        (returned as is if edited).

        Raises UserError when ``base`` is another table.
        """
        return self._swapped(base, self.base_digests, self.edited_digests, self.edited_rows)

    def revert_to(self, edited: Tensor) -> Tensor:
        """The inverse of `apply_to`, bit for bit. Raises UserError when ``edited`` is another
        table.
        """
        return self._swapped(edited, self.edited_digests, self.base_digests, self.base_rows)

    def apply(self, model: M) -> M:
        """Put the edit into a model, in place, and return it; a second time does nothing.

        ``model`` is a Hugging Face model with its VQ table (Janus, Emu3, Chameleon), or a
        `CodebookHolder`. A model that also *reads* pictures through this table (Emu3, Chameleon)
        reads them through the edited one from then on. Raises UserError, with the model untouched,
        when it has no table or another base.
        """
        _set_table(model, self.apply_to(find_table(model)))
        return model

    def revert(self, model: M) -> M:
        """Take the edit back, in any process, bit for bit; nothing to do on a base table. Errors
        as for `apply`.
        """
        _set_table(model, self.revert_to(find_table(model)))
        return model

    def verify(self, model: object) -> None:
        """Return when the model holds exactly the edited table; raise UserError otherwise."""
        digest = table_digest(find_table(model))
        if digest not in self.edited_digests.values():
            holds = (
                "the base table" if digest in self.base_digests.values() else f"table {digest[:12]}"
            )
            raise UserError(
                f"The model holds {holds}, not the edited table {self.edited_digest[:12]} of this file."
            )

    def _swapped(
        self, table: Tensor, have: dict[str, str], want: dict[str, str], rows: Tensor
    ) -> Tensor:
        digest = table_digest(table)
        own = str(table.dtype).removeprefix("torch.")
        precision = next((name for name in (own, *_PRECISIONS) if have[name] == digest), None)
        if precision is None:
            if digest in want.values():
                return table
            raise UserError(
                f"This safe codebook changes table {self.base_digest[:12]} of a {self.meta.family} model, but the "
                f"model holds table {digest[:12]}: load the checkpoint that the edit was made for."
            )
        swapped = table.detach().clone()
        swapped[self.rows.to(table.device)] = rows.to(_PRECISIONS[precision]).to(table)
        if table_digest(swapped) != want[precision]:  # only a damaged or forged file gets here
            raise UserError(
                f"The rows in this safe codebook do not lead to table {want[precision][:12]} as it claims."
            )
        return swapped

    def to_bytes(self) -> bytes:
        """The file's content; the same edit always gives the same bytes. UserError when the
        notes are too long.
        """
        record = {
            "schema": SCHEMA_VERSION,
            "method": self.meta.method,
            "family": self.meta.family,
            "round": self.meta.round,
            "notes": self.meta.notes,
            "shape": list(self.shape),
            "base": self.base_digests,
            "edited": self.edited_digests,
        }
        tensors = {"rows": self.rows, "base_rows": self.base_rows, "edited_rows": self.edited_rows}
        data: bytes = safetensors.torch.save(tensors, {_RECORD: json.dumps(record, sort_keys=True)})
        _header_size(data)
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> SafeCodebook:
        """Read a file's content. Nothing in it is executed; UserError for anything but a sound
        safe codebook.
        """
        size = _header_size(data)
        try:
            record = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_RECORD])
            version = record["schema"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                "The file is not a safe codebook: it lacks isic_ray's record."
            ) from error
        if version != SCHEMA_VERSION:
            raise UserError(
                f"The safe codebook has schema {version}, but this isic_ray reads {SCHEMA_VERSION}."
            )
        try:
            return cls._from_record(record, safetensors.torch.load(data))
        except (
            safetensors.SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
        ) as error:
            raise UserError(f"The safe codebook is damaged: {error}.") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> SafeCodebook:
        size, width = record["shape"]
        rows, base_rows, edited_rows = tensors["rows"], tensors["base_rows"], tensors["edited_rows"]
        if rows.dtype != torch.int64 or {base_rows.dtype, edited_rows.dtype} != {torch.float32}:
            raise ValueError("its tensors have other types")
        if rows.dim() != 1 or {base_rows.shape, edited_rows.shape} != {(len(rows), width)}:
            raise ValueError("its tensors have other shapes")
        if len(rows) and not (rows[0] >= 0 and rows[-1] < size and (rows[1:] > rows[:-1]).all()):
            raise ValueError("its row numbers are not ascending within the table")
        digests = [
            {name: str(record[side][name]) for name in _PRECISIONS} for side in ("base", "edited")
        ]
        meta = ArtifactMeta(
            str(record["method"]),
            str(record["family"]),
            int(record["round"]),
            dict(record["notes"]),
        )
        return cls(
            (int(size), int(width)), rows, base_rows, edited_rows, digests[0], digests[1], meta
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a local file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(self.to_bytes())
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SafeCodebook:
        """Read a local file or an fsspec URI (``s3://…``). UserError when it is missing or not a
        safe codebook.
        """
        try:
            if "://" in str(path):
                import fsspec

                stream = fsspec.open(str(path), "rb").open()
            else:
                stream = open(path, "rb")  # noqa: SIM115 - closed below, as fsspec's stream is
            with stream:
                start = stream.read(8)
                _header_size(
                    start
                )  # before reading on: a mistaken checkpoint may have many gigabytes
                return cls.from_bytes(start + stream.read())
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"There is no safe codebook file at {path}.") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def find_table(model: object) -> Tensor:
    """The VQ table ``[K,d]`` of a Hugging Face model or `CodebookHolder`. UserError when there
    is none.
    """
    weight = _table_weight(model)
    if weight is not None:
        return weight
    if isinstance(model, CodebookHolder) and isinstance(model.codebook, Tensor):
        return model.codebook
    raise UserError(
        f"{type(model).__name__} has no VQ codebook to edit: there is no {' nor '.join(_TABLE_PATHS)} nor codebook."
    )


def _table_weight(model: object) -> Tensor | None:
    if not isinstance(
        model, nn.Module
    ):  # an adapter may hold a model, yet its own table is what counts
        return None
    for path in _TABLE_PATHS:
        found: object = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.Embedding):
            return found.weight
    return None


def _set_table(model: object, table: Tensor) -> None:
    weight = _table_weight(model)
    if weight is not None:
        with torch.no_grad():
            weight.copy_(
                table
            )  # in place, so that captured graphs and optimisers keep their address
    elif isinstance(model, CodebookHolder):
        model.codebook = table


def _digests(table: Tensor) -> dict[str, str]:
    table_digest(table)  # refuses types that we would round silently
    return {name: table_digest(table.detach().to(dtype)) for name, dtype in _PRECISIONS.items()}


def _header_size(data: bytes) -> int:
    """Length of a safetensors header, from the first 8 bytes. UserError unless 2 <= length <=
    the cap.
    """
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise UserError(
            f"The content is not a safe codebook: a safetensors header of 2 to {MAX_HEADER_BYTES} bytes was expected."
        )
    return size
