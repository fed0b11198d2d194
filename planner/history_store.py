"""The history on disk: a SQLite file in which every acknowledged prompt survives a `kill -9`.

Write-ahead log with `synchronous=FULL`: a commit returns when its bytes are on the disk, and one
that was cut off is gone as a whole (docs/adr/0008-durable-history.md). No text of a prompt is kept.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remoe.errors import SettingsError, UnavailableError

__all__ = ["Entry", "HistoryIdentity", "HistoryStore", "HistoryUnwritableError", "history_path"]

_FORMAT = "1"
# A planner that is being replaced may need this long to let go of the file.
_TAKE_OVER_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS imports (digest TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
  id INTEGER PRIMARY KEY AUTOINCREMENT, vector BLOB NOT NULL, prefill BLOB NOT NULL,
  decode BLOB NOT NULL, n_tokens INTEGER NOT NULL, decode_tokens REAL NOT NULL,
  demand REAL NOT NULL, decoded REAL NOT NULL, topic TEXT NOT NULL, first_seen_s REAL NOT NULL,
  last_seen_s REAL NOT NULL);
"""
_COLUMNS = (
    "id, vector, prefill, decode, n_tokens, decode_tokens, demand, decoded, topic, "
    "first_seen_s, last_seen_s"
)


class HistoryUnwritableError(UnavailableError):
    """The disk is full, read-only or gone: the observation was not kept."""

    code = "history_unwritable"


@dataclass(frozen=True, slots=True)
class HistoryIdentity:
    """What a history is a history of; vectors and profiles of another cannot be compared."""

    model_digest: str
    embedder: str
    dimension: int
    layers: int
    experts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One prompt. `demand` counts how often it came, `decoded` how often anything was written.

    `decode` is `prefill` while `decoded` is 0; `decode_tokens` is the mean number of tokens written
    after the first. Times are seconds since 1970.
    """

    id: int
    vector: NDArray[np.float32]  # [dimension]
    prefill: NDArray[np.float32]  # [layers, experts]
    decode: NDArray[np.float32]  # [layers, experts]
    n_tokens: int
    decode_tokens: float
    demand: float
    decoded: float
    topic: str
    first_seen_s: float
    last_seen_s: float


def history_path(folder: Path, identity: HistoryIdentity) -> Path:
    """Where a folder keeps the history of a model and embedder."""
    digest = identity.model_digest.removeprefix("sha256:")[:12]
    return folder / f"{digest}-{identity.embedder}.sqlite"


class HistoryStore:
    """Entries by id. Usable from any thread, one at a time."""

    def __init__(
        self,
        identity: HistoryIdentity,
        db: sqlite3.Connection | None = None,
        *,
        path: Path | None = None,
        lock_fd: int | None = None,
        problem: str | None = None,
    ) -> None:
        """In memory unless given a connection; with a problem it takes files but no commits."""
        self.identity = identity
        self.path = path
        self.problem = problem
        """Why the last commit failed, or none can succeed; None while all is well."""
        self._refuses = problem is not None
        self._db = _connect(None) if db is None else db
        self._lock_fd = lock_fd
        self._batch = False
        self._check_identity()

    @classmethod
    def open(cls, path: Path | None, identity: HistoryIdentity) -> HistoryStore:
        """Open or create; raises SettingsError for a file of something else, or one in use.

        From a disk that cannot be written it is read, if it can be, and takes no commits. Without a
        path it is in memory and goes with the process.
        """
        if path is None:
            return cls(identity)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock_fd = _lock(path)
        except OSError as error:
            return cls(identity, _connect_read_only(path), path=path, problem=str(error))
        try:
            return cls(identity, _connect(path), path=path, lock_fd=lock_fd)
        except sqlite3.OperationalError as error:
            db = _connect_read_only(path)
            return cls(identity, db, path=path, lock_fd=lock_fd, problem=str(error))
        except sqlite3.DatabaseError as error:
            os.close(lock_fd)
            raise SettingsError(
                f"The history {path} is damaged or not a history: {error}. Move it away to start "
                "with an empty one."
            ) from error
        except SettingsError:
            os.close(lock_fd)
            raise

    @classmethod
    def read(cls, path: Path, identity: HistoryIdentity) -> HistoryStore:
        """Open for reading, a planner may be writing; raises SettingsError if there is none."""
        if not path.exists():
            raise SettingsError(f"There is no history at {path}; it is made when a planner runs.")
        return cls(identity, _connect_read_only(path), path=path, problem="opened for reading")

    def close(self) -> None:
        self._db.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    @property
    def durable(self) -> bool:
        """Whether what is acknowledged will be there after a crash."""
        return self.path is not None and self.problem is None

    @property
    def next_id(self) -> int:
        """Above every id there ever was, removed ones included."""
        row = self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
        return 0 if row is None else int(row[0]) + 1

    def entries(self) -> Iterator[Entry]:
        """All of them, oldest first."""
        for row in self._rows(f"SELECT {_COLUMNS} FROM entries ORDER BY id"):  # noqa: S608
            yield self._entry(row)

    def entry(self, entry_id: int) -> Entry:
        """One of them; it must be there."""
        query = f"SELECT {_COLUMNS} FROM entries WHERE id = ?"  # noqa: S608
        return self._entry(self._rows(query, (entry_id,)).fetchone())

    def profiles(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Prefill and decode profiles of entries that are there: [ids, 2, layers, experts]."""
        shape = (2, self.identity.layers, self.identity.experts)
        result = np.empty((len(ids), *shape), np.float32)
        query = "SELECT prefill, decode FROM entries WHERE id = ?"
        for row, entry_id in enumerate(ids):
            prefill, decode = self._rows(query, (int(entry_id),)).fetchone()
            result[row] = np.frombuffer(prefill + decode, np.float16).reshape(shape)
        return result

    def imported(self, digest: str) -> bool:
        """Whether a history file with this digest has been taken in."""
        query = "SELECT 1 FROM imports WHERE digest = ?"
        return self._rows(query, (digest,)).fetchone() is not None

    @contextmanager
    def batch(self, *, imported: str) -> Iterator[None]:
        """Make the commits inside durable together, as the import of a file with this digest."""
        self._batch = True
        try:
            self._write("BEGIN IMMEDIATE")
            yield
            self._write("INSERT INTO imports VALUES (?)", (imported,))
            self._write("COMMIT")
        finally:
            self._batch = False
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def commit(self, saved: Iterable[Entry], *, removed: Iterable[int] = ()) -> None:
        """Make all of it durable at once, or raise HistoryUnwritableError and change nothing.

        What is both saved and removed is saved.
        """
        if self._refuses and not self._batch:
            raise self._unwritable()
        marks = ", ".join("?" * len(_COLUMNS.split(",")))
        save = f"INSERT INTO entries ({_COLUMNS}) VALUES ({marks})"  # noqa: S608
        try:
            if not self._batch:
                self._write("BEGIN IMMEDIATE")
            for entry_id in removed:
                self._write("DELETE FROM entries WHERE id = ?", (entry_id,))
            for entry in saved:
                self._write("DELETE FROM entries WHERE id = ?", (entry.id,))
                self._write(save, self._columns(entry))
            if not self._batch:
                self._write("COMMIT")
        finally:
            if not self._batch and self._db.in_transaction:
                self._db.execute("ROLLBACK")
        self.problem = None

    def _write(self, statement: str, values: tuple[object, ...] = ()) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            self.problem = str(error)
            raise self._unwritable() from error

    def _unwritable(self) -> HistoryUnwritableError:
        again = "restart the planner" if self._refuses else "report again"
        return HistoryUnwritableError(
            f"The history {self.path} cannot be written ({self.problem}); nothing was kept. "
            f"Planning goes on. Free disk space or make the file writable, and {again}."
        )

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        return self._db.execute(query, values)

    def _check_identity(self) -> None:
        ours = {
            "format": _FORMAT,
            "model_digest": self.identity.model_digest,
            "embedder": self.identity.embedder,
            "shape": f"{self.identity.dimension} {self.identity.layers} {self.identity.experts}",
        }
        found = dict(self._rows("SELECT key, value FROM meta"))
        if not found:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", ours.items())
            self._db.execute("COMMIT")
        for key, value in ours.items() if found else ():
            if found.get(key) != value:
                raise SettingsError(
                    f"The history {self.path} is of {key} {found.get(key)}, but this planner's is "
                    f"{value}. Give each model and embedder a history of its own."
                )

    def _columns(self, entry: Entry) -> tuple[object, ...]:
        halves = (entry.vector, entry.prefill, entry.decode)
        blobs = (values.astype(np.float16).tobytes() for values in halves)
        return (
            entry.id,
            *blobs,
            entry.n_tokens,
            entry.decode_tokens,
            entry.demand,
            entry.decoded,
            entry.topic,
            entry.first_seen_s,
            entry.last_seen_s,
        )

    def _entry(self, row: tuple[object, ...]) -> Entry:
        entry_id, vector, prefill, decode, *rest = row
        shape = (self.identity.layers, self.identity.experts)
        rounded = _float32(vector)
        values = dict(zip(_COLUMNS.split(", ")[4:], rest, strict=True))
        return Entry(
            id=entry_id,  # type: ignore[arg-type]  # SQLite's rows are untyped; the schema is ours
            vector=rounded / (np.linalg.norm(rounded) or 1),
            prefill=_float32(prefill).reshape(shape),
            decode=_float32(decode).reshape(shape),
            **values,  # type: ignore[arg-type]
        )


def _float32(blob: object) -> NDArray[np.float32]:
    assert isinstance(blob, bytes)  # noqa: S101  # a column's type
    return np.frombuffer(blob, np.float16).astype(np.float32)


def _connect(path: Path | None) -> sqlite3.Connection:
    db = sqlite3.connect(
        ":memory:" if path is None else path, isolation_level=None, check_same_thread=False
    )
    if path is not None:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    db.executescript(_SCHEMA)
    return db


def _connect_read_only(path: Path) -> sqlite3.Connection:
    """What is there, or an empty history in memory if nothing can be read."""
    with suppress(sqlite3.OperationalError):
        uri = f"{path.absolute().as_uri()}?mode=ro"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        db.execute("SELECT count(*) FROM entries, meta, imports, sqlite_sequence")
        return db
    return _connect(None)


def _lock(path: Path) -> int:
    """Become the file's only writer; the kernel frees the lock with its holder."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    fd = os.open(path.with_name(path.name + ".lock"), flags, 0o600)
    deadline_s = time.monotonic() + _TAKE_OVER_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(fd)
                raise SettingsError(
                    f"The history {path} is in use by another planner. Stop that one, or give "
                    "each a history of its own."
                ) from None
            time.sleep(0.05)
        else:
            return fd
