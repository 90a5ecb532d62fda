"""Read and write objects on local, in-memory and S3 filesystems, without retries or validation.

The rest of the library uses `isic_ray.runs.store`, which adds both.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import fsspec

# S3's limit for one request; a conditional *multipart* upload is not honoured everywhere.
SINGLE_PUT_BYTES = 5 * 2**30
TEMPORARY = ".tmp-"  # how the names of unfinished local writes begin
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Files(Protocol):
    """Raw operations on one filesystem, below retries and validation: the place to inject faults.

    `read`, `delete`, `modified` (seconds since 1970) and `download` raise FileNotFoundError for a
    missing key. `create` writes all or nothing and raises (anything) when the key exists; `replace`
    overwrites atomically; `keys` yields every key in a folder, at any depth; `leftovers` yields the
    keys of writes that a killed process left unfinished.
    """

    parallel: int  # how many operations at once are worth it

    def read(self, key: str) -> bytes: ...
    def create(self, key: str, data: bytes) -> None: ...
    def replace(self, key: str, data: bytes) -> None: ...
    def exists(self, key: str) -> bool: ...
    def keys(self, folder: str) -> Iterable[str]: ...
    def delete(self, key: str) -> None: ...
    def modified(self, key: str) -> float: ...
    def download(self, key: str, path: str) -> None: ...
    def leftovers(self) -> Iterable[str]: ...


class LocalFiles:
    """A directory. Names that start with `.tmp-` are writes under way, or left by a killed process.

    A key with slashes is a path below the directory.
    """

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
            # There is still one winner, but a crash half-way leaves a torn file, which
            # `Run.verify` names.
            self._write_new(path, data)
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
        return self._walk(folder, temporary=False)

    def delete(self, key: str) -> None:
        os.unlink(self._path(key))

    def modified(self, key: str) -> float:
        return os.stat(self._path(key)).st_mtime

    def download(self, key: str, path: str) -> None:
        shutil.copyfile(self._path(key), path)

    def leftovers(self) -> Iterator[str]:
        return self._walk("", temporary=True)

    def _walk(self, folder: str, *, temporary: bool) -> Iterator[str]:
        for where, _, names in os.walk(self._path(folder)):
            for name in names:
                if name.startswith(TEMPORARY) == temporary:
                    yield os.path.relpath(os.path.join(where, name), self.root).replace(os.sep, "/")

    def _path(self, key: str) -> str:
        return os.path.join(self.root, *key.split("/"))

    def _write_temporary(self, path: str, data: bytes) -> str:
        folder = os.path.dirname(path)
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError as error:
            # A file lies where a folder should be: not to be confused with a lost race for the key.
            raise NotADirectoryError(
                errno.ENOTDIR, "a file is in the way of the directory", folder
            ) from error
        temporary = os.path.join(folder, f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
        try:
            self._write_new(temporary, data)
        except BaseException:  # what did not fit should not keep a full disk full
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
        """Make the new name itself survive a power cut, where the filesystem can."""
        descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)


class _FsspecFiles:
    """What an fsspec filesystem does alike for every kind of store."""

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

    def modified(self, key: str) -> float:
        return float(self._fs.modified(self._path(key)).timestamp())

    def download(self, key: str, path: str) -> None:
        self._fs.get_file(self._path(key), path)

    def leftovers(self) -> Iterator[str]:
        return iter(())

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"


class MemoryFiles(_FsspecFiles):
    """fsspec's in-process store, for tests and trials."""

    parallel = 1
    # fsspec's own exclusive mode checks, then writes: of two racing threads both could win.
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
    """A bucket, or a prefix of one.

    Endpoint, region and credentials come from the standard AWS environment variables.
    """

    parallel = 16

    def __init__(self, root: str) -> None:
        import s3fs  # half a second, and only these stores need it

        # Only `Store` retries: tries of botocore and s3fs would multiply its own. The instance is
        # private, so that this setting changes no other filesystem of the process, and has no
        # cache of listings, because other processes write here too.
        once = {
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "connect_timeout": 10,
            "read_timeout": 30,
        }
        filesystem = s3fs.S3FileSystem(
            config_kwargs=once, use_listings_cache=False, skip_instance_cache=True
        )
        filesystem.retries = 1
        super().__init__(root, filesystem)

    def create(self, key: str, data: bytes) -> None:
        self._put(key, data, "create")

    def replace(self, key: str, data: bytes) -> None:
        self._put(key, data, "overwrite")

    def _put(self, key: str, data: bytes, mode: str) -> None:
        if len(data) >= SINGLE_PUT_BYTES:
            raise ValueError(
                f"{key}: {len(data)} bytes do not fit one S3 request; split the object"
            )
        self._fs.pipe_file(self._path(key), data, mode=mode, chunksize=SINGLE_PUT_BYTES)
