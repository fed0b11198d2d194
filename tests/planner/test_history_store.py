from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner import history_store
from planner.history_store import (
    Entry,
    HistoryIdentity,
    HistoryStore,
    HistoryUnwritableError,
    history_path,
)
from remoe.errors import SettingsError
from tests.planner.test_history import SMALL, entries


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    opened = HistoryStore.open(tmp_path / "history.sqlite", SMALL)
    yield opened
    opened.close()


def ids(store: HistoryStore) -> list[int]:
    return [entry.id for entry in store.entries()]


def test_a_commit_is_on_the_disk_and_survives_power_cuts(store: HistoryStore) -> None:
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_commit_saves_and_removes_at_once(store: HistoryStore) -> None:
    store.commit(entries(3))
    changed = replace(next(entries(1)), demand=7.0)
    store.commit([changed], removed=[0, 2])
    assert ids(store) == [0, 1]
    assert store.entry(0).demand == 7
    assert store.next_id == 3


def test_profiles_come_in_the_order_asked(store: HistoryStore) -> None:
    odd = replace(next(entries(1)), id=5, decode=np.array([[0.25, 0.75]], np.float32))
    store.commit([*entries(2), odd])
    profiles = store.profiles([5, 0])
    assert profiles.shape == (2, 2, 1, 2)
    assert profiles[:, 1].tolist() == [[[0.25, 0.75]], [[1, 0]]]


def test_a_failed_batch_changes_nothing(store: HistoryStore) -> None:
    def failing() -> Iterator[Entry]:
        yield from entries(2)
        raise RuntimeError

    with pytest.raises(RuntimeError), store.batch(imported="file"):
        store.commit(failing())
    assert ids(store) == []
    assert not store.imported("file")
    with store.batch(imported="file"):
        store.commit(entries(2))
    assert store.imported("file")
    assert ids(store) == [0, 1]


@pytest.mark.parametrize(
    "other",
    [
        replace(SMALL, model_digest="sha256:other"),
        replace(SMALL, embedder="other"),
        replace(SMALL, dimension=3),
    ],
)
def test_a_history_of_something_else_is_refused(
    store: HistoryStore, other: HistoryIdentity
) -> None:
    store.close()
    assert store.path is not None
    with pytest.raises(SettingsError, match="Give each model and embedder"):
        HistoryStore.open(store.path, other)
    HistoryStore.open(store.path, SMALL).close()  # and the lock is free


def test_each_model_and_embedder_has_a_file_of_its_own(tmp_path: Path) -> None:
    others = [replace(SMALL, model_digest="sha256:ff"), replace(SMALL, embedder="other")]
    assert len({history_path(tmp_path, identity) for identity in (SMALL, *others)}) == 3


def test_a_file_in_use_is_refused(store: HistoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_store, "_TAKE_OVER_S", 0.0)
    assert store.path is not None
    with pytest.raises(SettingsError, match="in use by another planner"):
        HistoryStore.open(store.path, SMALL)


def test_a_file_in_use_can_be_read(store: HistoryStore) -> None:
    store.commit(entries(2))
    assert store.path is not None
    reader = HistoryStore.read(store.path, SMALL)
    assert ids(reader) == [0, 1]
    store.commit(replace(entry, id=entry.id + 2) for entry in entries(1))
    assert ids(reader) == [0, 1, 2]
    with pytest.raises(HistoryUnwritableError):
        reader.commit(entries(1))
    reader.close()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(SettingsError, match="Move it away"):
        HistoryStore.open(path, SMALL)


def test_a_folder_that_cannot_be_made_leaves_a_history_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = HistoryStore.open(tmp_path / "file" / "history.sqlite", SMALL)
    assert not store.durable
    with pytest.raises(HistoryUnwritableError, match="restart the planner"):
        store.commit(entries(1))
    assert ids(store) == []
    with store.batch(imported="shipped"):  # what is shipped can still be predicted from
        store.commit(entries(2))
    assert ids(store) == [0, 1]
    store.close()


def test_a_full_file_refuses_and_recovers(store: HistoryStore) -> None:
    store.commit(entries(1))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    large = [replace(entry, topic="x" * 9000, id=entry.id + 1) for entry in entries(3)]
    with pytest.raises(HistoryUnwritableError, match="report again") as caught:
        store.commit(large, removed=[0])
    assert (caught.value.status, caught.value.retryable) == (503, True)
    assert (ids(store), store.durable, store.problem) == ([0], False, "database or disk is full")
    store._db.execute("PRAGMA max_page_count = 100000")
    store.commit(large)
    assert (ids(store), store.durable) == ([0, 1, 2, 3], True)


def test_what_was_being_written_at_a_kill_is_gone_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    store = HistoryStore.open(path, SMALL)
    store.commit(entries(2))
    log = path.with_name(path.name + "-wal")
    whole = log.read_bytes()
    store.commit(replace(entry, id=entry.id + 2) for entry in entries(1))
    longer = log.read_bytes()
    files = {name: name.read_bytes() for name in (path, log)}
    store.close()
    for cut in range(len(whole), len(longer), 97):
        for name, content in files.items():
            name.write_bytes(content)
        log.write_bytes(longer[:cut])
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
        again = HistoryStore.open(path, SMALL)
        assert ids(again) == [0, 1]
        again.close()


def test_the_store_holds_no_text(store: HistoryStore) -> None:
    columns = {row[1]: row[2] for row in store._db.execute("PRAGMA table_info(entries)")}
    assert [name for name, kind in columns.items() if kind == "TEXT"] == ["topic"]
    assert isinstance(store._db, sqlite3.Connection)
