"""Link a run to another one's data: it stores its own decisions and shares all else."""

from __future__ import annotations

from typing import Any

from isic_ray.runs.store import Keys, Store

# What lies in the run's own store; all else is shared.
_OWN = ("run.json", "rounds", "ended.json", "summary.json", "progress.json", "report")


class LinkedStore(Store):
    """The store of a run at ``own``, whose commits and objects are those of the run at ``shared``.

    So every trial of a sweep reads the same tokens, pairs and verdicts, and finds what another
    trial has already judged or trained: the objects' names say what they are, and the first commit
    of a name stands.
    """

    def __init__(self, own: Store, shared: Store) -> None:
        self.uri, self.own, self.shared = own.uri, own, shared
        self.files = own.files

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.own, self.shared)

    def get(self, key: str) -> bytes:
        return self._home(key).get(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._home(key).put_if_absent(key, data)

    def put(self, key: str, data: bytes) -> None:
        self._home(key).put(key, data)

    def exists(self, key: str) -> bool:
        return self._home(key).exists(key)

    def list(self, prefix: str) -> Keys:
        return self._home(prefix).list(prefix)

    def delete(self, key: str) -> None:
        self._home(key).delete(key)

    def modified(self, key: str) -> float:
        return self._home(key).modified(key)

    def download(self, key: str, path: str) -> None:
        self._home(key).download(key, path)

    def probe(self) -> None:
        self.own.probe()

    def _home(self, key: str) -> Store:
        return self.own if key.partition("/")[0] in _OWN else self.shared
