"""Store an edit in one file, `SafeCodebook`, that applies to a stock model and reverts bit for bit.

The file is safetensors: the indices of the changed rows, their values before and after (float32),
and one JSON record.

Digests and precisions. A table is named by the SHA-256 of its float32 upcast (`table_digest`), so a
checkpoint has one name whether its bfloat16 table is loaded as bfloat16 or as float32. An edit is
built on the float32 table, though, and a user may load the same checkpoint in half precision. Since
rounding is a function of the table alone, the file also carries the digests of both tables *as
rounded to bfloat16 and float16*. Applying finds which rounding of the base the model holds, writes
the new rows under the same rounding, and checks the result against the digest of the edited table
under that rounding, so every outcome is exact. A table rounded in any other way is refused as
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
# A header that `SafeCodebook` wrote has a few kB. A larger one is another file, or an attack on the
# JSON parser.
MAX_HEADER_BYTES = 1 << 20
_RECORD = "isic_ray"  # the key of our JSON in safetensors' metadata
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Where Hugging Face models keep their VQ table, from the top object or from the model inside it.
_TABLE_PATHS = (
    "model.vqmodel.quantize.embedding",
    "vqmodel.quantize.embedding",
    "quantize.embedding",
)

M = TypeVar("M")


@runtime_checkable
class CodebookHolder(Protocol):
    """A model that keeps its table ``[K,d]`` in the attribute ``codebook``.

    The attribute is replaced by a new tensor; the old tensor is never written to.
    """

    codebook: Tensor


def table_digest(codebook: Tensor) -> str:
    """Return the SHA-256, in hex, of a table ``[K,d]``.

    Hashed are the dtype's name, the shape and the little-endian bytes of the float32 upcast. Raises
    UserError for dtypes other than float32, bfloat16 and float16, and for tables without data (meta
    device).
    """
    if codebook.dtype not in _PRECISIONS.values() or codebook.dim() != 2 or codebook.is_meta:
        raise UserError(
            f"The codebook is a {codebook.dtype} tensor of shape {list(codebook.shape)} on "
            f"{codebook.device}, but must be a loaded [rows, width] table in float32, bfloat16 or "
            "float16."
        )
    table = codebook.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(f"float32 {list(table.shape)} ".encode())
    digest.update(table.numpy().data.cast("B") if table.numel() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class ArtifactMeta:
    """Where an edit comes from; ``notes`` are JSON types (settings, rates, digests of the run)."""

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
    edited_digests: dict[str, str]  # precision -> digest of the edited table as rounded to it
    meta: ArtifactMeta

    @property
    def base_digest(self) -> str:
        """Return the `table_digest` of the float32 base table."""
        return self.base_digests["float32"]

    @property
    def edited_digest(self) -> str:
        """Return the `table_digest` of the float32 edited table."""
        return self.edited_digests["float32"]

    @classmethod
    def from_tables(cls, base: Tensor, edited: Tensor, meta: ArtifactMeta) -> SafeCodebook:
        """Make the edit that leads from one table ``[K,d]`` to another.

        Raises UserError for unlike shapes, edited rows that are not finite, and notes that JSON
        cannot hold.
        """
        if base.shape != edited.shape:
            raise UserError(
                f"The base table has shape {list(base.shape)}, but the edited one "
                f"{list(edited.shape)}."
            )
        base_digests, edited_digests = _digests(base), _digests(edited)
        base, edited = (
            table.detach().to("cpu", torch.float32).contiguous() for table in (base, edited)
        )
        # Bits are compared, not values: -0.0 and 0.0 are equal but not the same file.
        differs = base.view(torch.int32) != edited.view(torch.int32)
        changed = differs.any(dim=1).nonzero().flatten()
        if not edited[changed].isfinite().all():
            raise UserError(
                "The edited codebook holds values that are not finite, so the fine-tune has "
                "diverged."
            )
        try:
            notes = json.loads(json.dumps(meta.notes, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"The notes of a safe codebook must be JSON: {error}.") from error
        return cls(
            shape=(base.shape[0], base.shape[1]),
            rows=changed,
            base_rows=base[changed],
            edited_rows=edited[changed],
            base_digests=base_digests,
            edited_digests=edited_digests,
            meta=ArtifactMeta(meta.method, meta.family, meta.round, notes),
        )

    def apply_to(self, base: Tensor) -> Tensor:
        """Return the edited table ``[K,d]`` as a new tensor with the dtype and device of ``base``.

        A table that is already the edited one is returned as it is. Raises UserError when ``base``
        is another table.
        """
        return self._swapped(base, self.base_digests, self.edited_digests, self.edited_rows)

    def revert_to(self, edited: Tensor) -> Tensor:
        """Return the base table ``[K,d]``, bit for bit: the inverse of `apply_to`.

        Raises UserError when ``edited`` is another table.
        """
        return self._swapped(edited, self.edited_digests, self.base_digests, self.base_rows)

    def apply(self, model: M) -> M:
        """Put the edit into a model, in place, and return the model; a second time does nothing.

        ``model`` is a Hugging Face model with its VQ table (Janus, Emu3, Chameleon), or a
        `CodebookHolder`. A model that also *reads* pictures through this table (Emu3, Chameleon)
        reads them through the edited one from then on. Raises UserError, with the model untouched,
        when it has no table or another base.
        """
        _set_table(model, self.apply_to(find_table(model)))
        return model

    def revert(self, model: M) -> M:
        """Take the edit back, in any process, bit for bit; a base table stays as it is.

        Raises UserError as `apply` does.
        """
        _set_table(model, self.revert_to(find_table(model)))
        return model

    def verify(self, model: object) -> None:
        """Return when the model holds exactly the edited table; raise UserError otherwise."""
        digest = table_digest(find_table(model))
        if digest not in self.edited_digests.values():
            is_base = digest in self.base_digests.values()
            holds = "the base table" if is_base else f"table {digest[:12]}"
            raise UserError(
                f"The model holds {holds}, not the edited table {self.edited_digest[:12]} of this "
                "file."
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
                f"This safe codebook changes table {self.base_digest[:12]} of a {self.meta.family} "
                f"model, but the model holds table {digest[:12]}: load the checkpoint that the "
                "edit was made for."
            )
        swapped = table.detach().clone()
        swapped[self.rows.to(table.device)] = rows.to(_PRECISIONS[precision]).to(table)
        if table_digest(swapped) != want[precision]:  # only a damaged or forged file gets here
            raise UserError(
                "The rows in this safe codebook do not lead to table "
                f"{want[precision][:12]} as it claims."
            )
        return swapped

    def to_bytes(self) -> bytes:
        """Return the file's content; the same edit always gives the same bytes.

        Raises UserError when the notes are too long.
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
        """Read a file's content; nothing in it is executed.

        Raises UserError for anything but a sound safe codebook.
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
        return cls(
            shape=(int(size), int(width)),
            rows=rows,
            base_rows=base_rows,
            edited_rows=edited_rows,
            base_digests={name: str(record["base"][name]) for name in _PRECISIONS},
            edited_digests={name: str(record["edited"][name]) for name in _PRECISIONS},
            meta=ArtifactMeta(
                str(record["method"]),
                str(record["family"]),
                int(record["round"]),
                dict(record["notes"]),
            ),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a local file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(self.to_bytes())
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SafeCodebook:
        """Read a local file or an fsspec URI (``s3://…``).

        Raises UserError when the file is missing or not a safe codebook.
        """
        try:
            if "://" in str(path):
                import fsspec

                stream = fsspec.open(str(path), "rb").open()
            else:
                stream = open(path, "rb")  # noqa: SIM115 - closed below, as fsspec's stream is
            with stream:
                start = stream.read(8)
                # Checked before the rest is read: a mistaken checkpoint may have many gigabytes.
                _header_size(start)
                return cls.from_bytes(start + stream.read())
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"There is no safe codebook file at {path}.") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def find_table(model: object) -> Tensor:
    """Return the VQ table ``[K,d]`` of a Hugging Face model or a `CodebookHolder`.

    Raises UserError when there is none.
    """
    weight = _table_weight(model)
    if weight is not None:
        return weight
    if isinstance(model, CodebookHolder) and isinstance(model.codebook, Tensor):
        return model.codebook
    raise UserError(
        f"{type(model).__name__} has no VQ codebook to edit: there is no "
        f"{' nor '.join(_TABLE_PATHS)} nor codebook."
    )


def _table_weight(model: object) -> Tensor | None:
    # An adapter that is no module may hold such a model, yet its own `codebook` is what counts.
    if not isinstance(model, nn.Module):
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
            weight.copy_(table)  # in place: captured graphs and optimisers keep their address
    elif isinstance(model, CodebookHolder):
        model.codebook = table


def _digests(table: Tensor) -> dict[str, str]:
    table_digest(table)  # refuses types that we would round silently
    return {name: table_digest(table.detach().to(dtype)) for name, dtype in _PRECISIONS.items()}


def _header_size(data: bytes) -> int:
    """Return the length of a safetensors header, which the first 8 bytes tell.

    Raises UserError unless it lies between 2 and `MAX_HEADER_BYTES`.
    """
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise UserError(
            "The content is not a safe codebook: a safetensors header of 2 to "
            f"{MAX_HEADER_BYTES} bytes was expected."
        )
    return size
