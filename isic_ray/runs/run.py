"""Read and write a run directory: what is committed once stays, and the same command resumes.

    run.json                               configuration, fingerprint, plan, versions; written once
    data/STAGE/SHARD-SHA256.parquet        rows of one shard; without a commit it is garbage
    commits/STAGE/SHARD.json               written once: the first of several racing writers wins
    FOLDER/FILE, commits/FOLDER/FILE.json  a blob (`codebooks/DIGEST.safetensors`) and its commit
    rounds/N.json  quarantine/STAGE/SHARD.json                    written once
    ended.json  summary.json  progress.json  report/  attempts/   overwritten

The work that is left is the plan minus the commits. Every record but progress carries the digest of
its own content, every commit that of its object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from isic_ray.errors import UserError
from isic_ray.runs.linked import LinkedStore
from isic_ray.runs.records import (
    Damaged,
    Record,
    as_json,
    differences,
    fingerprint,
    json_or_repr,
    page_is_whole,
    parse_object,
    seal,
    seal_page,
    sha256_of,
    unseal,
)
from isic_ray.runs.schema import SCHEMA_VERSION, from_table, to_table
from isic_ray.runs.store import Conflict, Store

__all__ = ["Commit", "Damaged", "Record", "Run", "fingerprint"]

T = TypeVar("T")
Check = tuple[Callable[[str], Any], str]  # what reads an object again, and the object's key

# Folders that no blob may lie in.
_RESERVED = ("data", "commits", "rounds", "quarantine", "attempts", "report")
_WRITTEN_ONCE = ("commits", "rounds", "quarantine")
_ROUND = re.compile(r"rounds/(\d+)\.json")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]{0,150}")


@dataclasses.dataclass(frozen=True)
class Commit:
    """That an object is whole. ``counts`` is what the writer wanted remembered."""

    stage: str
    shard: str
    object: str  # key within the run
    sha256: str
    bytes: int
    rows: int  # 0 for blobs
    counts: Record
    schema: str  # "Sample/1": row type and schema version; "blob"


_COMMIT_FIELDS = {field.name for field in dataclasses.fields(Commit)}


class Run:
    """A run directory on a `Store`. Picklable. ``record`` is its run.json."""

    def __init__(self, store: Store, record: Record) -> None:
        self.store, self.record = store, record
        # By key; commits never change, so what was read once is not read again.
        self._commits: dict[str, Commit] = {}

    @classmethod
    def create_or_resume(cls, uri: str | Store, record: Record) -> Run:
        """Return the run at ``uri``, created if new with ``record`` as its run.json.

        An existing run is resumed, and its own record kept, if fingerprint and `PINNED` keys agree.
        Raises UserError naming what differs, and for a store that cannot create-if-absent.
        """
        store = uri if isinstance(uri, Store) else Store.open(uri)
        store.probe()
        sealed = seal({"schema": SCHEMA_VERSION, **record})
        with contextlib.suppress(Conflict):
            store.put_if_absent("run.json", sealed)
        run = cls.open(store)
        found = differences(record, run.record)
        if found:
            raise UserError(
                f"{store.uri} holds a run with other settings ({'; '.join(found)}); "
                "give another --out, or the same settings to resume it."
            )
        return run

    @classmethod
    def open(cls, uri: str | Store) -> Run:
        """Return an existing run, for reading.

        Raises UserError when there is none, or another version of isic_ray wrote it.
        """
        store = uri if isinstance(uri, Store) else Store.open(uri)
        try:
            record = unseal(store.get("run.json"), f"{store.uri}/run.json")
        except FileNotFoundError:
            raise UserError(
                f"{store.uri} is not a run (it has no run.json); give the --out of `isic run`."
            ) from None
        version, writer = record.get("schema"), record.get("versions")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{store.uri} was written with schema version {version}, this isic_ray reads "
                f"{SCHEMA_VERSION}; use the isic_ray version that wrote it ({writer})."
            )
        if shared := record.get("shared"):
            store = LinkedStore(store, Store.open(shared))
        return cls(store, record)

    # Shards

    def commit(
        self, stage: str, shard: str, rows: list[Any], kind: type, counts: Record | None = None
    ) -> Commit:
        """Store the rows (of dataclass ``kind``, a row type of `schema`) of one shard; idempotent.

        The first commit of a shard stands: a later writer gets the winner's commit, whatever its
        own rows were. Raises ValueError for a malformed name.
        """
        key = _commit_key(stage, shard)
        buffer = io.BytesIO()
        pq.write_table(to_table(rows, kind), buffer, compression="zstd")  # equal rows, equal bytes
        data = buffer.getvalue()
        sha256 = sha256_of(data)
        target = f"data/{stage}/{shard}-{sha256}.parquet"
        try:
            self.store.put_if_absent(target, data)
        except Conflict:
            # The name says what the bytes must be, so what is there is damaged: write it again.
            self.store.put(target, data)
        schema = f"{kind.__name__}/{SCHEMA_VERSION}"
        commit = Commit(stage, shard, target, sha256, len(data), len(rows), counts or {}, schema)
        return self._remember(key, self._first_record(key, dataclasses.asdict(commit)))

    def committed(self, stage: str) -> dict[str, Commit]:
        """Return the commits of a stage by shard, in the shards' order."""
        keys = self.store.list(f"commits/{_name(stage)}")
        return {commit.shard: commit for commit in self.store.each(self._read_commit, keys)}

    def stages(self) -> list[str]:
        """Return the names of all that has commits: stages of rows, and folders of blobs."""
        return sorted({key.split("/")[1] for key in self.store.list("commits")})

    def commit_at(self, key: str) -> Commit | None:
        """Read the commit under ``key`` again; None when there is none. Raises `Damaged`."""
        self._commits.pop(key, None)
        try:
            return self._read_commit(key)
        except FileNotFoundError:
            return None

    def pending(self, stage: str, planned: list[str]) -> list[str]:
        """Return the planned shards that have no commit, in the plan's order."""
        done = set(self.store.list(f"commits/{_name(stage)}"))
        return [shard for shard in planned if _commit_key(stage, shard) not in done]

    def read(self, stage: str, kind: type[T], shards: Sequence[str] | None = None) -> list[T]:
        """Read a stage's committed rows in the shards' order, or those of ``shards`` unlisted.

        Raises `Damaged`, FileNotFoundError for a shard that is not committed, ValueError for rows
        of another kind.
        """
        if shards is None:
            commits = list(self.committed(stage).values())
        else:
            keys = [_commit_key(stage, shard) for shard in shards]
            commits = list(self.store.each(self._read_commit, keys))
        parts = self.store.each(lambda commit: self._rows(commit, kind), commits)
        return [row for rows in parts for row in rows]

    def read_shard(self, stage: str, shard: str, kind: type[T]) -> list[T]:
        """Read one shard's rows. Raises as `read` does."""
        return self._rows(self._read_commit(_commit_key(stage, shard)), kind)

    # Blobs

    def put_blob(self, name: str, data: bytes) -> Commit:
        """Store ``data`` as ``name``, FOLDER/FILE with FILE a digest of the content; idempotent.

        The first object of a name stands, even if other bytes come later (safetensors may order
        metadata at random); compare the returned sha256 where that matters.
        """
        folder, file = _blob_name(name)
        try:
            self.store.put_if_absent(name, data)
        except Conflict:
            data = self.store.get(name)
        commit = Commit(folder, file, name, sha256_of(data), len(data), 0, {}, "blob")
        key = f"commits/{name}.json"
        return self._remember(key, self._first_record(key, dataclasses.asdict(commit)))

    def get_blob(self, name: str) -> bytes:
        """Return a blob's bytes. Raises FileNotFoundError if not committed, `Damaged`."""
        _blob_name(name)
        return self._object(self._read_commit(f"commits/{name}.json"))

    # Decisions, quarantined rows, and what may change

    def commit_round(self, n: int, record: Record) -> Record:
        """Record the decision on round ``n``; return the one that stands, the first of all."""
        return self._first_record(f"rounds/{n}.json", record)

    def rounds(self) -> dict[int, Record]:
        """Return the decisions by round, ascending."""
        matches = [_ROUND.fullmatch(key) for key in self.store.list("rounds")]
        numbers = sorted(int(match[1]) for match in matches if match)
        return {n: self._record(f"rounds/{n}.json") for n in numbers}

    def quarantine(self, stage: str, shard: str, rows: list[Record]) -> int:
        """Store failed rows with their error, before the `commit` of the same shard.

        Returns how many stand: a second try's rows do not count again. What JSON lacks is kept as
        its repr.
        """
        key = f"quarantine/{_name(stage)}/{_name(shard)}.json"
        safe = [{str(name): json_or_repr(value) for name, value in row.items()} for row in rows]
        return len(self._first_record(key, {"rows": safe})["rows"])

    def quarantined(self, stage: str | None = None) -> list[Record]:
        """Return the quarantined rows of one stage, or of all."""
        keys = self.store.list(f"quarantine/{_name(stage)}" if stage else "quarantine")
        return [row for record in self.store.each(self._record, keys) for row in record["rows"]]

    def write_summary(self, summary: Record) -> Record:
        """End the run: overwrite ended.json, then summary.json.

        Returns the summary as stored, with its digest. ended.json lists every record that stands by
        now, so that `verify` can name one that is lost later. Raises ValueError for NaN and
        infinity, which JSON does not know.
        """
        data = seal(summary, indent=2)
        keys = [key for folder in _WRITTEN_ONCE for key in self.store.list(folder)]
        self.store.put("ended.json", seal({"records": keys}))
        self.store.put("summary.json", data)
        return parse_object(data, "summary.json")

    def summary(self) -> Record:
        """Return what `write_summary` wrote last. Raises FileNotFoundError when it never did."""
        data, where = self.store.get("summary.json"), self._where("summary.json")
        unseal(data, where)
        return parse_object(data, where)

    def write_progress(self, progress: Record) -> None:
        """Overwrite progress.json, for those who watch."""
        self.store.put("progress.json", json.dumps(progress, allow_nan=False).encode())

    def progress(self) -> Record | None:
        """Return what `write_progress` wrote last; None when there is nothing readable."""
        try:
            return parse_object(self.store.get("progress.json"), "progress.json")
        except (FileNotFoundError, Damaged):
            return None

    def write_page(self, key: str, page: str) -> None:
        """Overwrite a report's HTML page, with its digest in a comment at its end."""
        self.store.put(key, seal_page(page))

    def write_note(self, key: str, note: Record) -> None:
        """Overwrite a note under ``attempts/``: what helps a later try, and may be lost."""
        self.store.put(key, seal(note))

    def read_note(self, key: str) -> Record | None:
        """Return a note; None when there is none that is whole."""
        try:
            return self._record(key)
        except (FileNotFoundError, Damaged):
            return None

    # Verification

    def verify(self) -> list[str]:
        """Read every committed object again; return one sentence for each problem."""
        list_of = self.store.list
        checks: list[Check] = [(lambda _: Run.open(self.store), "run.json")]
        checks += [(self._record, key) for key in list_of("rounds") if _ROUND.fullmatch(key)]
        checks += [(self._record, key) for key in list_of("quarantine")]
        checks += [(self._check_commit, key) for key in list_of("commits")]
        checks += [(self._check_page, key) for key in list_of("report") if key.endswith(".html")]
        if self.store.exists("summary.json") or self.store.exists("ended.json"):
            checks += [(self._record, "summary.json"), (self._check_ended, "ended.json")]
        return [problem for problem in self.store.each(_problem, checks) if problem]

    def _check_commit(self, key: str) -> None:
        self._commits.pop(key, None)
        commit = self._read_commit(key)
        data = self._object(commit)
        kind, _, version = commit.schema.partition("/")
        if kind == "blob":
            return
        if version != str(SCHEMA_VERSION):
            raise Damaged(f"{self._where(key)}: unknown schema version {version}.")
        rows = pq.ParquetFile(io.BytesIO(data)).metadata.num_rows
        if rows != commit.rows:
            where = self._where(commit.object)
            raise Damaged(f"{where} has {rows} rows, its commit says {commit.rows}.")

    def _check_ended(self, key: str) -> None:
        present = {name for folder in _WRITTEN_ONCE for name in self.store.list(folder)}
        lost = [name for name in self._record(key)["records"] if name not in present]
        if lost:
            names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            raise Damaged(
                f"{self._where(names)} was there when the run ended and is missing; run it again."
            )

    def _check_page(self, key: str) -> None:
        if not page_is_whole(self.store.get(key)):
            raise Damaged(f"{self._where(key)} is damaged; `isic report` writes it again.")

    # Reading and writing single records

    def _first_record(self, key: str, record: Record) -> Record:
        """Return the record that stands under ``key``, as it will be read: the first one."""
        try:
            self.store.put_if_absent(key, seal(record))
            return as_json(record)
        except Conflict:
            return self._record(key)

    def _record(self, key: str) -> Record:
        return unseal(self.store.get(key), self._where(key))

    def _where(self, key: str) -> str:
        return f"{self.store.uri}/{key}"

    def _read_commit(self, key: str) -> Commit:
        return self._commits.get(key) or self._remember(key, self._record(key))

    def _remember(self, key: str, record: Record) -> Commit:
        commit = Commit(**record) if record.keys() == _COMMIT_FIELDS else None
        if commit is None or key != f"commits/{commit.stage}/{commit.shard}.json":
            where = self._where(key)
            raise Damaged(f"{where} is not the commit of this shard; remove it and run again.")
        self._commits[key] = commit
        return commit

    def _object(self, commit: Commit) -> bytes:
        where = self._where(commit.object)
        record = f"commits/{commit.stage}/{commit.shard}.json"
        fix = f"remove it and {record}, then run the same command again"
        try:
            data = self.store.get(commit.object)
        except FileNotFoundError:
            raise Damaged(f"{where} was committed but is missing; {fix}.") from None
        if len(data) != commit.bytes:
            raise Damaged(f"{where} has {len(data)} bytes, its commit says {commit.bytes}; {fix}.")
        if sha256_of(data) != commit.sha256:
            raise Damaged(f"{where} is damaged (its sha256 is not the committed one); {fix}.")
        return data

    def _rows(self, commit: Commit, kind: type[T]) -> list[T]:
        wanted = f"{kind.__name__}/{SCHEMA_VERSION}"
        if commit.schema != wanted:
            raise ValueError(f"{commit.object} holds {commit.schema} rows, not {wanted}")
        return from_table(pq.read_table(io.BytesIO(self._object(commit))), kind)


def _problem(check: Check) -> str | None:
    try:
        check[0](check[1])
    except FileNotFoundError as error:
        return f"{error} is missing."
    except (UserError, pa.ArrowException, OSError) as error:
        return str(error)
    return None


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a valid stage or shard name: {name!r}")
    return name


def _commit_key(stage: str, shard: str) -> str:
    return f"commits/{_name(stage)}/{_name(shard)}.json"


def _blob_name(name: str) -> tuple[str, str]:
    folder, _, file = name.partition("/")
    if folder in _RESERVED:
        raise ValueError(f"a blob may not lie in {folder}/: {name!r}")
    return _name(folder), _name(file)
