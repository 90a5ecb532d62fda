"""Object stores: plain paths, `file://`, `memory://` and `s3://` behind seven operations.

`Store` is what the rest of the library uses: it validates keys, retries what is transient, and turns what is not into
one sentence for the user. Beneath it lies `Files`, six raw operations on one filesystem; tests inject faults there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Protocol, TypeVar

import fsspec

from isic_ray.errors import UserError

A = TypeVar("A")
B = TypeVar("B")
Keys = list[str]

TRIES = 7  # with the pauses below about 13 s before giving up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
SINGLE_PUT_BYTES = 5 * 2**30  # S3's limit for one request; a conditional *multipart* upload is not honoured everywhere
_KEY_PART = re.compile(r"[!-.0-\[\]-~]{1,255}")  # printable ASCII without space, "/" and "\"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_LIKE_URI = re.compile(r"[A-Za-z0-9+]+:/")  # also catches the typing error s3:/bucket
_TRANSIENT_CODES = frozenset({"SlowDown", "RequestTimeout", "OperationAborted", "XAmzContentSHA256Mismatch"})
_TRANSIENT_ERRNO = frozenset({errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH})
_TRANSIENT_TYPES = re.compile(  # of botocore and aiohttp, by name: importing them costs half a second
    "ConnectionError|TimeoutError|HTTPClientError|ClientPayloadError|IncompleteReadError|ResponseParserError"
)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Conflict(Exception):
    """Other bytes were already stored under a key that is written once. The message is the key."""


class Files(Protocol):
    """Raw operations on one filesystem, below retries and validation: the place to inject faults.

    `read` and `delete` raise FileNotFoundError for a missing key. `create` writes all or nothing and raises (anything)
    when the key exists; `replace` overwrites atomically; `keys` yields every key in a folder, at any depth.
    """

    parallel: int  # how many operations at once are worth it

    def read(self, key: str) -> bytes: ...
    def create(self, key: str, data: bytes) -> None: ...
    def replace(self, key: str, data: bytes) -> None: ...
    def exists(self, key: str) -> bool: ...
    def keys(self, folder: str) -> Iterable[str]: ...
    def delete(self, key: str) -> None: ...


class LocalFiles:
    """A directory. Names that start with `.tmp-` are writes under way, or what a killed process left of one."""

    parallel = 1

    def __init__(self, root: str) -> None:
        self.root = root

    def read(self, key: str) -> bytes:
        with open(self._path(key), "rb") as file:
            return file.read()

    def create(self, key: str, data: bytes) -> None:
        path = self._path(key)
        temporary = self._write_temporary(path, data)
        try:
            os.link(temporary, path)  # unlike rename, refuses when the name is taken
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._write_new(path, data)  # still one winner, but a crash half-way leaves a torn file for verify to name
        finally:
            os.unlink(temporary)
        self._sync_folder(path)

    def replace(self, key: str, data: bytes) -> None:
        path = self._path(key)
        os.replace(self._write_temporary(path, data), path)
        self._sync_folder(path)

    def exists(self, key: str) -> bool:
        return os.path.isfile(self._path(key))

    def keys(self, folder: str) -> Iterator[str]:
        for where, _, names in os.walk(self._path(folder)):
            for name in names:
                if not name.startswith(".tmp-"):
                    yield os.path.relpath(os.path.join(where, name), self.root).replace(os.sep, "/")

    def delete(self, key: str) -> None:
        os.unlink(self._path(key))

    def _path(self, key: str) -> str:
        return os.path.join(self.root, *key.split("/"))

    def _write_temporary(self, path: str, data: bytes) -> str:
        folder = os.path.dirname(path)
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError as error:  # a file is in the way; not to be confused with a lost race for the key
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the way of the directory", folder) from error
        temporary = os.path.join(folder, f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
        try:
            self._write_new(temporary, data)
        except BaseException:  # a full disk should not be kept full by what did not fit
            os.unlink(temporary)
            raise
        return temporary

    @staticmethod
    def _write_new(path: str, data: bytes) -> None:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _sync_folder(path: str) -> None:
        """Makes the new name itself survive a power cut, where the filesystem can."""
        descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)


class _FsspecFiles:
    def __init__(self, root: str, filesystem: Any) -> None:
        self.root, self._fs = root, filesystem

    def read(self, key: str) -> bytes:
        return bytes(self._fs.cat_file(self._path(key)))

    def exists(self, key: str) -> bool:
        try:
            return bool(self._fs.info(self._path(key))["type"] == "file")
        except FileNotFoundError:
            return False

    def keys(self, folder: str) -> Iterator[str]:
        return (path.removeprefix(self.root + "/") for path in self._fs.find(self._path(folder)))

    def delete(self, key: str) -> None:
        self._fs.rm_file(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"


class MemoryFiles(_FsspecFiles):
    """fsspec's in-process store. Its own exclusive mode checks, then writes: racing threads could both win."""

    parallel = 1
    _creating = threading.Lock()

    def __init__(self, root: str) -> None:
        super().__init__(root, fsspec.filesystem("memory"))

    def create(self, key: str, data: bytes) -> None:
        with self._creating:
            if self.exists(key):
                raise FileExistsError(key)
            self.replace(key, data)

    def replace(self, key: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(key), data)


class S3Files(_FsspecFiles):
    """A bucket, or a prefix of one. Endpoint, region and credentials come from the standard AWS environment."""

    parallel = 16

    def __init__(self, root: str) -> None:
        import s3fs  # half a second, and only these stores need it

        # One layer retries, `Store`: botocore and s3fs would multiply its tries. A private instance, so that this
        # setting leaks into nobody else's filesystem; no listing cache, because other processes write here too.
        once = {"retries": {"total_max_attempts": 1, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 120}
        filesystem = s3fs.S3FileSystem(config_kwargs=once, use_listings_cache=False, skip_instance_cache=True)
        filesystem.retries = 1
        super().__init__(root, filesystem)

    def create(self, key: str, data: bytes) -> None:
        self._put(key, data, "create")

    def replace(self, key: str, data: bytes) -> None:
        self._put(key, data, "overwrite")

    def _put(self, key: str, data: bytes, mode: str) -> None:
        if len(data) >= SINGLE_PUT_BYTES:
            raise ValueError(f"{key}: {len(data)} bytes do not fit one S3 request; split the object")
        self._fs.pipe_file(self._path(key), data, mode=mode, chunksize=SINGLE_PUT_BYTES)


class Store:
    """Immutable and replaceable objects under one URI; keys are relative, like `commits/tokens/0001.json`.

    Every operation retries transient failures (``sleep`` is injectable) and raises UserError for what the user can
    mend, ValueError for a malformed key. Pickles as its URI: a worker opens its own connection. A subclass, or
    ``files``, injects faults.
    """

    def __init__(self, uri: str, files: Files | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        self.uri, root, files_type = _parse(uri)
        self.files: Files = files_type(root) if files is None else files
        self._sleep = sleep

    @classmethod
    def open(cls, uri: str) -> Store:
        """The store at a path, `file://`, `memory://` or `s3://` URI. No request is sent yet. Raises UserError."""
        return cls(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri,)

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError when there is none."""
        return self._retry("read", check_key(key), lambda: self.files.read(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Creates the object; of many racing writers exactly one wins.

        True: created. False: the same bytes were there already, perhaps by an earlier try whose reply was lost.
        Raises `Conflict` when other bytes are there. Servers answer a conflict with differing errors, so after any
        error the object is read back and compared.
        """
        check_key(key)
        for pause in _pauses():
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
                pass  # neither ours nor anybody's: a true failure, or a 409 whose rival has not finished
            if pause is None or not (_is_transient(failure) or _is_taken(failure)):
                break
            self._sleep(pause)
        _give_up(failure, self.uri, "write", key)

    def put(self, key: str, data: bytes) -> None:
        """Overwrites atomically. For what may change only: summary, report, progress."""
        self._retry("write", check_key(key), lambda: self.files.replace(key, data))

    def exists(self, key: str) -> bool:
        """Whether there is an object; a folder is none."""
        return self._retry("read", check_key(key), lambda: self.files.exists(key))

    def list(self, prefix: str) -> Keys:
        """Sorted keys of all objects in folder ``prefix``, at any depth; [] when there is none."""
        folder = check_key(prefix.rstrip("/"))
        keys = self._retry("list", folder, lambda: list(self.files.keys(folder)))
        return sorted(key for key in keys if key.startswith(folder + "/"))

    def delete(self, key: str) -> None:
        """Removes the object; no error when there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._retry("delete", check_key(key), lambda: self.files.delete(key))

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """``map``, in order; on remote stores several at once."""
        if self.files.parallel == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(self.files.parallel) as pool:
            yield from pool.map(function, items)

    def probe(self) -> None:
        """Writes, refuses to overwrite, reads and deletes a small object. Raises UserError if the store cannot."""
        key = f"probe-{secrets.token_hex(8)}"
        self.put_if_absent(key, b"first")
        try:
            self.put_if_absent(key, b"second")
        except Conflict:
            return
        else:
            raise UserError(
                f"{self.uri}: this store lets a second writer overwrite an object (it ignores If-None-Match), "
                "so results could be lost; use AWS S3, Ceph, a recent MinIO or a local directory."
            )
        finally:
            with contextlib.suppress(UserError):  # many buckets forbid deletion; the probe's few bytes may stay
                self.delete(key)

    def _retry(self, verb: str, key: str, operation: Callable[[], A]) -> A:
        for pause in _pauses():
            try:
                return operation()
            except Exception as error:
                failure = error
            if pause is None or not _is_transient(failure):
                break
            self._sleep(pause)
        _give_up(failure, self.uri, verb, key)


def check_key(key: str) -> str:
    """Returns the key if each part between its slashes is non-empty printable ASCII and starts with no dot.

    Raises ValueError otherwise; so keys can't leave the store (`..`, `/etc`) nor look like temporary files.
    """
    parts = key.split("/")
    if len(key) > 900 or any(part.startswith(".") or not _KEY_PART.fullmatch(part) for part in parts):
        raise ValueError(f"not a valid key: {key!r}")
    return key


def _pauses() -> Iterator[float | None]:
    """Seconds to wait after each failed try, None after the last. Jitter keeps workers from returning in step."""
    for step in range(TRIES - 1):
        yield min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**step) * random.uniform(0.5, 1.5)
    yield None


def _parse(uri: str) -> tuple[str, str, Callable[[str], Files]]:
    """Canonical URI (paths become absolute: workers start elsewhere), root within the filesystem, and its type."""
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


def _answer(error: BaseException) -> tuple[str, int]:
    """Error code and HTTP status of an S3 server's answer; ("", 0) when no server answered."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return "", 0
    return response.get("Error", {}).get("Code", ""), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _is_taken(error: Exception) -> bool:
    return isinstance(error, FileExistsError) or _answer(error)[1] == 412


def _is_transient(error: Exception) -> bool:
    code, status = _answer(error)
    if status or code:
        return status in (408, 409, 429) or (status >= 500 and status != 501) or code in _TRANSIENT_CODES
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return error.errno in _TRANSIENT_ERRNO
    return any(_TRANSIENT_TYPES.fullmatch(base.__name__) for base in type(error).__mro__)


def _give_up(error: Exception, uri: str, verb: str, key: str) -> NoReturn:
    """Raises what callers handle (FileNotFoundError, bugs) as it is, and all else as a sentence with its mend."""
    remote = uri.startswith("s3://")
    if _answer(error)[0] == "NoSuchBucket":
        text = "there is no such bucket; create it or mend the URI"
    elif isinstance(error, FileNotFoundError):
        raise FileNotFoundError(f"{uri}/{key}") from error
    elif isinstance(error, PermissionError):
        mend = "check the credentials and the bucket's policy" if remote else "check the directory's rights"
        text = f"permission denied to {verb} {key} ({error}); {mend}"
    elif isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
        text = "a file is where a directory should be, or the reverse; choose another path"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = "the disk is full; free some space and run the same command again"
    elif _is_transient(error):
        mend = "check the network and AWS_ENDPOINT_URL" if remote else "check the disk"
        text = f"could not {verb} {key} in {TRIES} tries ({error}); {mend}, then run the same command again"
    elif type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        text = "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every machine of the cluster"
    elif isinstance(error, OSError):
        text = f"could not {verb} {key}: {error}"
    else:
        raise error
    raise UserError(f"{uri}: {text}.") from error
