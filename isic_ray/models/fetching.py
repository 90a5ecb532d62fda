"""Checkpoints that lie in a bucket, copied once to each machine: `model.name:
s3://BUCKET/CHECKPOINT`.

The copy has the files' digests beside it. A file that is torn or damaged is fetched again; whether
it is the right one is decided by the run, which pins the digest of the weights.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from isic_ray.errors import UserError
from isic_ray.models.checkpoints import digest_files, first_line
from isic_ray.runs.store import Store

_ENDINGS = (".json", ".safetensors", ".jinja", ".txt", ".model")  # nothing that could hold a pickle
_MANIFEST = "isic-ray-files.json"


def cached_checkpoint(uri: str) -> Path:
    """The local copy of the checkpoint in the folder ``uri``, fetched if need be; one process a
    machine fetches.

    It lies in ``$ISIC_CACHE`` (default: ~/.cache/isic_ray). Raises UserError when there is no
    checkpoint.
    """
    store = Store.open(uri)
    place = _root() / hashlib.sha256(store.uri.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place / ".lock"):
        known = _manifest(place)
        wanted = known or [
            key for key in store.list("") if key.endswith(_ENDINGS) and "/" not in key
        ]
        if "config.json" not in wanted:
            raise UserError(f"{store.uri} is not a checkpoint: it has no config.json")
        digests = {name: _fetched(store, place, name, known.get(name)) for name in wanted}
        if digests != known:
            partial = place / f"{_MANIFEST}.part"
            partial.write_text(json.dumps({"uri": store.uri, "files": digests}))
            partial.replace(place / _MANIFEST)
    return place


def _fetched(store: Store, place: Path, name: str, digest: str | None) -> str:
    """The digest of the local file, fetched unless it has the digest that is expected."""
    path = place / name
    if digest and path.is_file() and digest_files([path]) == digest:
        return digest
    partial = place / f"{name}.part"
    store.download(name, str(partial))
    found = digest_files([partial])
    if digest and found != digest:
        raise UserError(
            f"{store.uri}/{name} has changed since {place} was fetched; delete that folder to fetch it anew"
        )
    os.replace(partial, path)
    return found


def _manifest(place: Path) -> dict[str, str]:
    try:
        return dict(json.loads((place / _MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _root() -> Path:
    return Path(os.environ.get("ISIC_CACHE") or "~/.cache/isic_ray").expanduser() / "models"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system also when the process is killed
        yield


_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def resolve_checkpoint(name: str) -> Path:
    """The directory of "pictogram", of a path, or of a URI or hub name (fetched). UserError when
    there is none.
    """
    if name == "pictogram":
        from isic_ray.pictogram.checkpoint import WEIGHTS

        if not WEIGHTS.is_dir():
            raise UserError(
                f"the embedded model's weights are missing from {WEIGHTS}; reinstall isic_ray"
            )
        return WEIGHTS
    if "://" in name:
        from isic_ray.models.fetching import cached_checkpoint

        return cached_checkpoint(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"model {name!r} is a file; give the checkpoint's directory")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(
            f"model {name!r} is neither a directory nor a hub name of the form owner/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise UserError(
            f"model {name!r} is no directory here, and the hub did not give it: {first_line(error)}"
        ) from error
