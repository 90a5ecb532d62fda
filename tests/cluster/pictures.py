"""Generated pictures with captions, as Parquet shards, WebDataset tars or single files, at any
URI.
"""

from __future__ import annotations

import io
import tarfile
from random import Random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from isic_ray.pictogram.draw import draw
from isic_ray.pictogram.scene import caption, sample_scene, sample_wording


def write_pictures(uri: str, count: int, shard: int, kind: str = "parquet") -> None:
    """``count`` benign pictures below ``uri``, ``shard`` to a file (kind "files": one to a
    file).
    """
    filesystem, root = fsspec.core.url_to_fs(uri)
    if "://" not in uri:
        filesystem.makedirs(root, exist_ok=True)
    for start in range(0, count, shard):
        rows = [_picture(index) for index in range(start, min(count, start + shard))]
        if kind == "files":
            for index, (png, _) in enumerate(rows):
                filesystem.pipe_file(f"{root}/{start + index:06d}.png", png)
            continue
        buffer = io.BytesIO()
        if kind == "parquet":
            pq.write_table(
                pa.table(
                    {"image": [png for png, _ in rows], "caption": [text for _, text in rows]}
                ),
                buffer,
            )
        else:
            _write_tar(buffer, rows)
        filesystem.pipe_file(f"{root}/part-{start // shard:04d}.{kind}", buffer.getvalue())


def _picture(index: int) -> tuple[bytes, str]:
    rng = Random(f"pictures/{index}")
    scene, buffer = sample_scene(rng, unsafe=False), io.BytesIO()
    draw(scene, rng).save(buffer, "PNG")
    return buffer.getvalue(), caption(scene, sample_wording(rng, scene))


def _write_tar(buffer: io.BytesIO, rows: list[tuple[bytes, str]]) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index, (png, text) in enumerate(rows):
            for suffix, data in (("png", png), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
