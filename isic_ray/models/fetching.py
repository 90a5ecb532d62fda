"""Find the directory of a checkpoint by its name, and fetch it first where it lies elsewhere.

A name is "pictogram", a directory, a URI such as ``s3://BUCKET/CHECKPOINT``, or a hub name. From a
URI each machine copies the files once, into ``$ISIC_CACHE`` (default: ~/.cache/isic_ray). The copy
has the files' digests beside it, so a file that is torn or damaged is fetched again. Whether it is
the right checkpoint is for the run to say, which pins the digest of the weights.
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
_DIGESTS = "isic-ray-files.json"


def resolve_checkpoint(name: str) -> Path:
    """Return the directory of a checkpoint, fetched if it is elsewhere.

    Raises UserError when there is none of that name.
    """
    if name == "pictogram":
        return _embedded()
    if "://" in name:
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
    return _from_hub(name)


def cached_checkpoint(uri: str) -> Path:
    """Return this machine's copy of the checkpoint in the folder ``uri``, fetched if need be.

    One process per machine fetches; the others wait for it. Raises UserError when there is no
    checkpoint, or it has changed since a damaged copy was fetched.
    """
    store = Store.open(uri)
    place = _root() / hashlib.sha256(store.uri.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place / ".lock"):
        known = _known_digests(place)
        wanted = known or [
            key for key in store.list("") if key.endswith(_ENDINGS) and "/" not in key
        ]
        if "config.json" not in wanted:
            raise UserError(f"{store.uri} is not a checkpoint: it has no config.json")
        digests = {name: _fetch(store, place, name, known.get(name)) for name in wanted}
        if digests != known:
            partial = place / f"{_DIGESTS}.part"
            partial.write_text(json.dumps({"uri": store.uri, "files": digests}))
            partial.replace(place / _DIGESTS)
    return place


def _embedded() -> Path:
    from isic_ray.pictogram.checkpoint import WEIGHTS

    if not WEIGHTS.is_dir():
        raise UserError(
            f"the embedded model's weights are missing from {WEIGHTS}; reinstall isic_ray"
        )
    return WEIGHTS


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{end}" for end in _ENDINGS]))
    except Exception as error:
        raise UserError(
            f"model {name!r} is no directory here, and the hub did not give it: {first_line(error)}"
        ) from error


def _fetch(store: Store, place: Path, name: str, digest: str | None) -> str:
    """Return the digest of the local file, downloaded unless it has the expected ``digest``."""
    path = place / name
    if digest and path.is_file() and digest_files([path]) == digest:
        return digest
    partial = place / f"{name}.part"
    store.download(name, str(partial))
    found = digest_files([partial])
    if digest and found != digest:
        raise UserError(
            f"{store.uri}/{name} has changed since {place} was fetched; "
            "delete that folder to fetch it again"
        )
    os.replace(partial, path)
    return found


def _known_digests(place: Path) -> dict[str, str]:
    """Return the digests of the files that were fetched, by name; none before they all were."""
    try:
        return dict(json.loads((place / _DIGESTS).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _root() -> Path:
    return Path(os.environ.get("ISIC_CACHE") or "~/.cache/isic_ray").expanduser() / "models"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file. The system releases it also when the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
