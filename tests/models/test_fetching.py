"""Is a checkpoint in a bucket fetched once per machine, checked, and fetched again if damaged?"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.fetching import cached_checkpoint, resolve_checkpoint
from isic_ray.models.registry import read_spec
from isic_ray.pictogram.checkpoint import WEIGHTS
from isic_ray.runs.filesystems import MemoryFiles
from isic_ray.runs.store import Store


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ISIC_CACHE", str(tmp_path / "cache"))
    store = Store.open(f"memory://{uuid4().hex}/model")
    store.put("config.json", b'{"model_type": "janus"}')
    store.put("model.safetensors", bytes(1000))
    store.put("pytorch_model.bin", b"a pickle")
    store.put("training/optimizer.safetensors", b"not needed")
    return store.uri


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = MemoryFiles.download

    def download(files: Any, key: str, path: str) -> None:
        seen.append(key)
        original(files, key, path)

    monkeypatch.setattr(MemoryFiles, "download", download)
    return seen


def test_fetched_once_and_without_what_is_not_needed(uri: str, downloads: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(cached_checkpoint, [uri] * 4))
    (place,) = places
    assert sorted(downloads) == ["config.json", "model.safetensors"]
    assert (place / "model.safetensors").read_bytes() == bytes(1000)
    assert not (place / "pytorch_model.bin").exists()
    assert resolve_checkpoint(uri) == place
    assert len(downloads) == 2


@pytest.mark.parametrize("damage", [b"", bytes(999), bytes(999) + b"\1"])
def test_a_damaged_copy_is_fetched_again(uri: str, downloads: list[str], damage: bytes) -> None:
    path = cached_checkpoint(uri) / "model.safetensors"
    path.write_bytes(damage)
    cached_checkpoint(uri)
    assert path.read_bytes() == bytes(1000)
    assert downloads.count("model.safetensors") == 2


def test_a_fetch_that_was_killed_is_done_over(uri: str, downloads: list[str]) -> None:
    place = cached_checkpoint(uri)
    (place / "isic-ray-files.json").unlink()
    (place / "model.safetensors.part").write_bytes(b"torn")
    (place / "model.safetensors").write_bytes(b"torn too")
    assert (cached_checkpoint(uri) / "model.safetensors").read_bytes() == bytes(1000)


def test_a_bucket_that_changed_under_a_damaged_copy_is_refused(uri: str) -> None:
    (cached_checkpoint(uri) / "model.safetensors").write_bytes(b"rot")
    Store.open(uri).put("model.safetensors", bytes(1001))
    with pytest.raises(
        UserError, match=r"model\.safetensors has changed since .* delete that folder"
    ):
        cached_checkpoint(uri)


def test_no_checkpoint_there(uri: str) -> None:
    with pytest.raises(UserError, match=r"is not a checkpoint: it has no config\.json"):
        cached_checkpoint(f"{uri}-other")


def test_the_embedded_model_from_a_store_is_the_same_model(uri: str) -> None:
    store = Store.open(f"memory://{uuid4().hex}/pictogram")
    for path in WEIGHTS.iterdir():
        store.put(path.name, path.read_bytes())
    assert (
        read_spec(ModelConfig(name=store.uri)).weights_digest
        == read_spec(ModelConfig()).weights_digest
    )
