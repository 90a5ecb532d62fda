"""The store on local and in-memory filesystems: creation, keys, retries, sentences for the user."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from isic_ray.errors import UserError
from isic_ray.runs.filesystems import MemoryFiles
from isic_ray.runs.retry import TRIES
from isic_ray.runs.store import Conflict, Store


@pytest.fixture(params=["local", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uris = {
        "local": str(tmp_path),
        "file": f"file://{tmp_path}",
        "memory": f"memory://{uuid4().hex}",
    }
    return Store.open(uris[request.param])


class Flaky:
    """Files whose next operations raise the given errors, before or after they take effect."""

    parallel = 1

    def __init__(self, errors: list[Exception], after: bool = False) -> None:
        self.inner, self.errors, self.after, self.calls = (
            MemoryFiles(f"/{uuid4().hex}"),
            errors,
            after,
            0,
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            self.calls += 1
            error = self.errors.pop(0) if self.errors else None
            if error and not self.after:
                raise error
            result = getattr(self.inner, name)(*arguments)
            if error:
                raise error
            return result

        return operation


def flaky(*errors: Exception, after: bool = False) -> tuple[Store, Flaky, list[float]]:
    slept: list[float] = []
    files = Flaky(list(errors), after)
    return Store("memory://unused", files=files, sleep=slept.append), files, slept


def test_bytes_come_back_and_lists_are_sorted_and_recursive(store: Store) -> None:
    assert store.list("a") == []
    assert not store.exists("a/b")
    for key in ("a/c", "a/b", "a/d/e", "ab/c"):
        assert store.put_if_absent(key, key.encode() + b"\0\xff")
    assert store.get("a/b") == b"a/b\0\xff"
    assert store.list("a") == store.list("a/") == ["a/b", "a/c", "a/d/e"]
    assert store.exists("a/b")
    assert not store.exists("a/d")
    store.put("a/b", b"")
    assert store.get("a/b") == b""
    store.delete("a/b")
    store.delete("a/b")
    assert store.list("a") == ["a/c", "a/d/e"]
    with pytest.raises(FileNotFoundError, match="a/b"):
        store.get("a/b")


def test_created_once(store: Store) -> None:
    assert store.put_if_absent("k", b"one") is True
    assert store.put_if_absent("k", b"one") is False
    with pytest.raises(Conflict, match="k"):
        store.put_if_absent("k", b"two")
    assert store.get("k") == b"one"


def test_one_winner_of_eight_threads(store: Store) -> None:
    for attempt in range(10):
        barrier = threading.Barrier(8)

        def race(n: int, key: str = f"k/{attempt}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                return store.put_if_absent(key, b"%d" % n * 1000)
            except Conflict:
                return False

        with ThreadPoolExecutor(8) as pool:
            wins = list(pool.map(race, range(8)))
        assert wins.count(True) == 1
        assert store.get(f"k/{attempt}") == b"%d" % wins.index(True) * 1000


def _race(uri: str, barrier: Any, wins: Any, n: int) -> None:
    store = Store.open(uri)
    for attempt in range(20):
        barrier.wait()
        try:
            if store.put_if_absent(f"k/{attempt}", b"%d" % n * 1000):
                wins.put((attempt, n))
        except Conflict:
            pass


def test_one_winner_of_eight_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(8), context.Queue()
    processes = [
        context.Process(target=_race, args=(str(tmp_path), barrier, wins, n)) for n in range(8)
    ]
    for process in processes:
        process.start()
    winners = [wins.get(timeout=20) for _ in range(20)]
    for process in processes:
        process.join()
    assert wins.empty()
    assert sorted(attempt for attempt, _ in winners) == list(range(20))
    for attempt, n in winners:
        assert Store.open(str(tmp_path)).get(f"k/{attempt}") == b"%d" % n * 1000


def test_no_temporary_file_stays_nor_shows(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    store.put_if_absent("a/b", b"1")
    store.put("a/c", b"2")
    with pytest.raises(Conflict):
        store.put_if_absent("a/b", b"2")
    assert sorted(os.listdir(tmp_path / "a")) == ["b", "c"]
    (tmp_path / "a" / ".tmp-123-abc").write_bytes(b"what a killed process left")
    assert store.list("a") == ["a/b", "a/c"]


@pytest.mark.parametrize("operation", ["link", "replace"])
def test_a_crash_before_the_name_is_given_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    store = Store.open(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, crash)
        with pytest.raises(KeyboardInterrupt):
            (store.put_if_absent if operation == "link" else store.put)("a/b", b"1")
    assert store.list("a") == []
    assert store.put_if_absent("a/b", b"2")


def test_filesystems_without_links_still_have_one_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    store = Store.open(str(tmp_path))
    assert store.put_if_absent("a/b", b"1")
    with pytest.raises(Conflict):
        store.put_if_absent("a/b", b"2")
    store.probe()
    assert os.listdir(tmp_path / "a") == ["b"]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        ".",
        "a/.tmp-1",
        "a b",
        "ä",
        "a\\b",
        "a\n",
        "x" * 256,
        "a\0",
    ],
)
def test_keys_that_could_leave_or_confuse_the_store_are_refused(store: Store, key: str) -> None:
    for operation in (
        store.get,
        store.exists,
        store.delete,
        lambda k: store.put(k, b""),
        check_create(store),
    ):
        with pytest.raises(ValueError, match="not a valid key"):
            operation(key)


def check_create(store: Store) -> Callable[[str], bool]:
    return lambda key: store.put_if_absent(key, b"")


def test_pickled_as_its_uri(store: Store) -> None:
    store.put_if_absent("k", b"1")
    other = pickle.loads(pickle.dumps(store))
    assert other.uri == store.uri
    assert other.get("k") == b"1"


def test_relative_paths_hold_in_a_worker_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store.open("runs/x").uri == str(tmp_path / "runs" / "x")


@pytest.mark.parametrize(
    "uri", ["", "s3://", "s3:/bucket/x", "s3:///x", "gs://bucket", "http://x/y", "s3://a_bad*one/x"]
)
def test_other_places_are_refused_in_a_sentence(uri: str) -> None:
    with pytest.raises(UserError, match="no place to store a run"):
        Store.open(uri)


def test_transient_errors_are_retried_with_growing_pauses() -> None:
    store, files, slept = flaky(
        ConnectionResetError("reset"), TimeoutError(), OSError(errno.EBUSY, "slow down")
    )
    store.put("k", b"1")
    assert files.calls == 4
    assert len(slept) == 3
    assert slept[0] < slept[2]
    assert store.get("k") == b"1"


def test_retries_are_bounded_and_end_in_a_sentence() -> None:
    store, files, slept = flaky(*[ConnectionResetError("reset")] * 50)
    with pytest.raises(
        UserError, match=r"memory://unused: could not read k in 10 tries .*run the same command"
    ):
        store.get("k")
    assert files.calls == TRIES
    assert len(slept) == TRIES - 1
    # longer than a server takes to restart, shorter than a person waits
    assert 30 < sum(slept) < 60


def test_own_write_whose_reply_was_lost_is_a_success() -> None:
    for lost in (
        ConnectionResetError("reset"),
        OSError(22, "precondition failed"),
        FileExistsError("412"),
    ):
        store, _, slept = flaky(lost, after=True)
        assert store.put_if_absent("k", b"1") is False
        assert not slept
        with pytest.raises(Conflict):
            store.put_if_absent("k", b"2")


def test_conflict_without_an_object_is_tried_again() -> None:
    """409: the rival's write is under way, and may yet fail."""
    store, _, slept = flaky(FileExistsError("409"))
    assert store.put_if_absent("k", b"1") is True
    assert len(slept) == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "no"), "permission denied to write k"),
        (OSError(errno.ENOSPC, "full"), "the disk is full"),
        (IsADirectoryError("x"), "a file is where a directory should be"),
        (OSError(errno.EIO, "bad sector"), "could not write k: .*bad sector"),
    ],
)
def test_what_the_user_can_fix_is_one_sentence(error: Exception, sentence: str) -> None:
    for operation in ("put", "put_if_absent"):
        store, _, slept = flaky(error)
        with pytest.raises(UserError, match=f"memory://unused: {sentence}") as caught:
            getattr(store, operation)("k", b"1")
        assert not slept
        assert str(caught.value).endswith(".")


def test_bugs_keep_their_traceback() -> None:
    store, _, _ = flaky(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError, match="bug"):
        store.put_if_absent("k", b"1")


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = Store.open(str(tmp_path / "file"))
    for operation in (store.probe, lambda: store.get("k"), lambda: store.put("a/b", b"1")):
        with pytest.raises(UserError, match="a file is where a directory should be"):
            operation()


def test_probe_accepts_these_stores_and_leaves_nothing(store: Store) -> None:
    store.probe()
    assert list(store.files.keys("")) == []


def test_probe_refuses_a_store_that_overwrites() -> None:
    class Careless(MemoryFiles):
        def create(self, key: str, data: bytes) -> None:
            self.replace(key, data)

    with pytest.raises(UserError, match="lets a second writer overwrite"):
        Store("memory://x", files=Careless(f"/{uuid4().hex}")).probe()


def test_each_keeps_the_order_also_when_parallel() -> None:
    store, files, _ = flaky()
    files.parallel = 4
    assert list(store.each(lambda n: n * n, range(20))) == [n * n for n in range(20)]


def test_what_botocore_and_aiohttp_raise_on_a_bad_network_is_retried() -> None:
    import aiohttp
    from botocore import exceptions

    errors: list[Exception] = [
        kind(endpoint_url="http://x", error="slow")
        for kind in (
            exceptions.ReadTimeoutError,
            exceptions.ConnectTimeoutError,
            exceptions.EndpointConnectionError,
            exceptions.ConnectionClosedError,
        )
    ]
    for error in [
        *errors,
        aiohttp.ClientPayloadError("torn"),
        aiohttp.ServerDisconnectedError(),
        TimeoutError(),
    ]:
        store, files, _ = flaky(error)
        store.put("k", b"1")
        assert files.calls == 2, error
