"""Pictures in a folder or a bucket as a Ray Data stream.

They lie there as files of their own, in Parquet files, or in WebDataset tars.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from isic_ray.errors import UserError

_KINDS = {"parquet": (".parquet",), "tar": (".tar",), "files": (".png", ".jpg", ".jpeg", ".webp")}
# Where Parquet files and tars keep pictures.
_COLUMNS = ("image", "picture", "png", "jpg", "jpeg", "webp", "bytes")
MAX_PIXELS = 64_000_000  # a picture of a few kB may unfold to more than the memory
_EVALUATED = 50  # one file of so many is set aside


@dataclass(frozen=True)
class PictureFiles:
    """Paths or URIs of one kind: those to train on and those set aside to evaluate on."""

    kind: str
    train: list[str]
    evaluate: list[str]


def find_pictures(uri: str) -> PictureFiles:
    """Return the files below ``uri``, split by a hash of their names.

    Raises UserError when it cannot be listed, and for too few files or several kinds.
    """
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
        paths = [filesystem.unstrip_protocol(path) for path in filesystem.find(root)]
    except Exception as error:  # every filesystem has errors of its own
        raise UserError(f"{uri} cannot be listed: {str(error).partition(chr(10))[0]}.") from error
    by_kind = {
        kind: [p for p in paths if PurePosixPath(p).suffix.lower() in ends]
        for kind, ends in _KINDS.items()
    }
    found = {kind: members for kind, members in by_kind.items() if members}
    if len(found) != 1:
        what = " and ".join(found) or "no pictures"
        raise UserError(
            f"{uri} holds {what}; give a folder of pictures, of Parquet files, or of WebDataset "
            "tars."
        )
    kind, members = next(iter(found.items()))
    if len(members) < 2:
        raise UserError(
            f"{uri} holds one file; give at least two, since one is set aside to evaluate on."
        )
    ordered = sorted(members, key=_hash_of_name)
    aside = max(1, len(members) // _EVALUATED)
    return PictureFiles(kind, sorted(ordered[aside:]), sorted(ordered[:aside]))


def _hash_of_name(path: str) -> bytes:
    return hashlib.sha256(PurePosixPath(path).name.encode()).digest()


def stream(kind: str, files: list[str], size: int, seed: int | None = None) -> Any:
    """Return a Ray Data set with one column, ``picture`` uint8 ``[size,size,3]``.

    Without ``seed`` it is in the order of the files, with one in a new order each epoch. Pictures
    are cut to their middle square and resized; what cannot be read is left out.
    """
    import ray
    from ray.data import FileShuffleConfig

    options: dict[str, Any] = {"shuffle": None if seed is None else FileShuffleConfig(seed=seed)}
    if kind == "parquet":
        dataset = ray.data.read_parquet(files, columns=[_parquet_column(files[0])], **options)
    elif kind == "tar":  # undecoded: Ray would unpickle what a tar calls .pkl
        dataset = ray.data.read_webdataset(files, decoder=None, suffixes=list(_COLUMNS), **options)
    else:
        dataset = ray.data.read_binary_files(files, **options)
    dataset.context.execution_options.preserve_order = seed is None
    return dataset.map_batches(_Decode(size), batch_size=64, batch_format="pyarrow")


def _parquet_column(path: str) -> str:
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(path) as file:
        names = pq.ParquetFile(file).schema_arrow.names
    found = next((name for name in _COLUMNS if name in names), None)
    if found is None:
        raise UserError(
            f"{path} has no column of pictures, only {', '.join(names)}; call it {_COLUMNS[0]}."
        )
    return found


@dataclass(frozen=True)
class _Decode:
    size: int

    def __call__(self, batch: Any) -> dict[str, np.ndarray]:
        column = next(name for name in _COLUMNS if name in batch.column_names)
        pictures = [self._picture(value) for value in batch.column(column).to_pylist()]
        readable = [picture for picture in pictures if picture is not None]
        shape = (0, self.size, self.size, 3)
        return {"picture": np.stack(readable) if readable else np.empty(shape, np.uint8)}

    def _picture(self, value: Any) -> np.ndarray | None:
        from PIL import Image, ImageOps

        # The Hub's image columns hold {bytes, path}.
        data: Any = value.get("bytes") if isinstance(value, dict) else value
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                return np.asarray(ImageOps.fit(image.convert("RGB"), (self.size, self.size)))
        except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
