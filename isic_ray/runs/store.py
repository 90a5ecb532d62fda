"""Store objects at plain paths, `file://`, `memory://` and `s3://`, all through one class, `Store`.

`Store` is what the rest of the library uses: it validates keys, retries transient failures, and
turns other failures into one sentence for the user. Beneath it lies `filesystems.Files`, raw
operations on one filesystem; tests inject faults there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from isic_ray.errors import UserError
from isic_ray.runs.filesystems import Files, LocalFiles, MemoryFiles, S3Files
from isic_ray.runs.retry import TRIES, is_taken, is_transient, pauses, server_answer

A = TypeVar("A")
B = TypeVar("B")
Keys = list[str]  # within `Store` the name list is its method

_KEY_PART = re.compile(r"[!-.0-\[\]-~]{1,255}")  # printable ASCII without space, "/" and "\"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_LIKE_URI = re.compile(r"[A-Za-z0-9+]+:/")  # also catches the typing error s3:/bucket


class Conflict(Exception):
    """Other bytes were already stored under a key that is written once. The message is the key."""


class Store:
    """Objects under one URI, immutable and replaceable ones; keys are like `commits/tokens/1.json`.

    Every operation retries transient failures (``sleep`` is injectable) and raises UserError for
    what the user can fix, ValueError for a malformed key. It pickles as its URI: a worker opens its
    own connection. A subclass, or ``files``, injects faults.
    """

    def __init__(
        self, uri: str, files: Files | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.uri, root, files_type = _parse(uri)
        self.files: Files = files_type(root) if files is None else files
        self._sleep = sleep

    @classmethod
    def open(cls, uri: str) -> Store:
        """Return the store at a path, `file://`, `memory://` or `s3://` URI; sends no request yet.

        Raises UserError for any other place.
        """
        return cls(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri,)

    def get(self, key: str) -> bytes:
        """Return the object's bytes. Raises FileNotFoundError when there is none."""
        return self._retry("read", check_key(key), lambda: self.files.read(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object; of many racing writers exactly one wins.

        Returns True if this call created it, and False if the same bytes were there already,
        perhaps by an earlier try whose reply was lost. Raises `Conflict` when other bytes are
        there. Servers answer a conflict with differing errors, so after any error the object is
        read back and compared.
        """
        check_key(key)
        for pause in pauses():
            try:
                self.files.create(key, data)
                return True
            except Exception as error:
                failure = error
            try:
                if self.get(key) == data:
                    return False
                raise Conflict(key) from failure
            except FileNotFoundError:
                # Nobody has written it: a true failure, or a 409 whose rival has not finished.
                pass
            if pause is None or not (is_transient(failure) or is_taken(failure)):
                break
            self._sleep(pause)
        _give_up(failure, self.uri, "write", key)

    def put(self, key: str, data: bytes) -> None:
        """Overwrite the object atomically. For what may change only: summary, report, progress."""
        self._retry("write", check_key(key), lambda: self.files.replace(key, data))

    def exists(self, key: str) -> bool:
        """Return whether there is an object; a folder is none."""
        return self._retry("read", check_key(key), lambda: self.files.exists(key))

    def list(self, prefix: str) -> Keys:
        """Return the sorted keys of all objects in folder ``prefix``, at any depth.

        The folder "" is the whole store; there is no error for a folder that does not exist.
        """
        folder = check_key(prefix.rstrip("/")) if prefix else ""
        keys = self._retry("list", folder, lambda: list(self.files.keys(folder)))
        return sorted(key for key in keys if not folder or key.startswith(folder + "/"))

    def delete(self, key: str) -> None:
        """Remove the object; there is no error when there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._retry("delete", check_key(key), lambda: self.files.delete(key))

    def modified(self, key: str) -> float:
        """Return when the object was last written, in seconds since 1970.

        Raises FileNotFoundError when there is none.
        """
        return self._retry("read", check_key(key), lambda: self.files.modified(key))

    def download(self, key: str, path: str) -> None:
        """Copy an object of any size to a local file.

        Raises FileNotFoundError when there is none.
        """
        self._retry("read", check_key(key), lambda: self.files.download(key, path))

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Yield ``function(item)`` for each item, in order; on remote stores several at once."""
        if self.files.parallel == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(self.files.parallel) as pool:
            yield from pool.map(function, items)

    def probe(self) -> None:
        """Write a small object, try to overwrite it, read it and delete it.

        Raises UserError if the store cannot do that, or lets a second writer overwrite an object.
        """
        key = f"probe-{secrets.token_hex(8)}"
        self.put_if_absent(key, b"first")
        try:
            self.put_if_absent(key, b"second")
        except Conflict:
            return
        else:
            raise UserError(
                f"{self.uri}: this store lets a second writer overwrite an object (it ignores "
                "If-None-Match), so results could be lost; use AWS S3, Ceph, a recent MinIO or a "
                "local directory."
            )
        finally:
            # Many buckets forbid deletion; the probe's few bytes may stay.
            with contextlib.suppress(UserError):
                self.delete(key)

    def _retry(self, verb: str, key: str, operation: Callable[[], A]) -> A:
        for pause in pauses():
            try:
                return operation()
            except Exception as error:
                failure = error
            if pause is None or not is_transient(failure):
                break
            self._sleep(pause)
        _give_up(failure, self.uri, verb, key)


def check_key(key: str) -> str:
    """Return the key if each part between its slashes is printable ASCII and starts with no dot.

    Raises ValueError otherwise, so that keys cannot leave the store (`..`, `/etc`) nor look like
    temporary files.
    """
    parts = key.split("/")
    if len(key) > 900 or any(
        part.startswith(".") or not _KEY_PART.fullmatch(part) for part in parts
    ):
        raise ValueError(f"not a valid key: {key!r}")
    return key


def _parse(uri: str) -> tuple[str, str, Callable[[str], Files]]:
    """Return a canonical URI, the root within its filesystem, and the type of its files.

    Paths become absolute, because workers start in other directories.
    """
    scheme, separator, rest = uri.partition("://")
    rest = rest.strip("/")
    if separator and scheme == "s3" and _BUCKET.fullmatch(rest.partition("/")[0]):
        return f"s3://{rest}", rest, S3Files
    if separator and scheme == "memory":
        return f"memory://{rest}", f"/{rest}".rstrip("/"), MemoryFiles
    if (separator and scheme == "file") or (uri and not _LIKE_URI.match(uri)):
        path = os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
        return path, path, LocalFiles
    raise UserError(f"{uri!r} is no place to store a run; give a directory or s3://BUCKET/PREFIX.")


def _give_up(error: Exception, uri: str, verb: str, key: str) -> NoReturn:
    """Raise what callers handle (FileNotFoundError, bugs) as it is, and all else as a sentence."""
    remote = uri.startswith("s3://")
    if server_answer(error)[0] == "NoSuchBucket":
        text = "there is no such bucket; create it or fix the URI"
    elif isinstance(error, FileNotFoundError):
        raise FileNotFoundError(f"{uri}/{key}") from error
    elif isinstance(error, PermissionError):
        check = "the credentials and the bucket's policy" if remote else "the directory's rights"
        text = f"permission denied to {verb} {key} ({error}); check {check}"
    elif isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
        text = "a file is where a directory should be, or the reverse; choose another path"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = "the disk is full; free some space and run the same command again"
    elif is_transient(error):
        check = "the network and AWS_ENDPOINT_URL" if remote else "the disk"
        text = (
            f"could not {verb} {key} in {TRIES} tries ({error}); check {check}, then run the same "
            "command again"
        )
    elif type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        text = (
            "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every machine "
            "of the cluster"
        )
    elif isinstance(error, OSError):
        text = f"could not {verb} {key}: {error}"
    else:
        raise error
    raise UserError(f"{uri}: {text}.") from error
