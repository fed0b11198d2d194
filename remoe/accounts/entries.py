"""What is written down of one request."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from typing import Literal

import msgspec
from msgspec.structs import astuple
from sqlalchemy import Connection, Engine

from remoe.accounts.schema import KEEP_ALIVE, REQUESTS

__all__ = [
    "ANONYMOUS",
    "MOST_AT_ONCE",
    "Entry",
    "EntryInserts",
    "KeepAlive",
    "Outcome",
    "day_of",
    "write_entries",
]

# The key of requests that came without one.
ANONYMOUS = "-"
# Rows of one statement: a statement may have 32,766 values in SQLite, 65,535 in PostgreSQL.
MOST_AT_ONCE = 500

Outcome = Literal["finished", "cancelled", "failed"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `id` is the reply's own and unique, `request_id` the client's or ours.

    `metered` is false where the main function could not say what was used, as when the client
    left early: amounts are then 0. Resident amounts are null where no runtime told us of replicas.
    """

    id: str
    request_id: str
    finished_at_us: int
    day: str
    key_id: str
    model: str
    outcome: Outcome
    prompt_tokens: int
    completion_tokens: int
    plan_id: str | None
    deployment_plan_id: str | None
    price_book: str
    metered: bool
    main_gpu_kb_s: int
    main_cpu_kb_s: int
    remote_kb_s: int
    main_gpu_nano_usd: int
    main_cpu_nano_usd: int
    remote_nano_usd: int
    total_nano_usd: int
    resident_kb_s: int | None
    resident_starting_kb_s: int | None
    resident_nano_usd: int | None
    remote_calls: int
    remote_bytes: int
    local_fallbacks: int
    ttft_us: int | None
    tpot_us: int | None
    total_us: int
    main_cold_start_us: int
    experts_cold_start_us: int
    predicted_ttft_us: int | None
    predicted_tpot_us: int | None
    predicted_nano_usd: int | None


class KeepAlive(msgspec.Struct, frozen=True, kw_only=True):
    """Memory held while no request was there, since the last such row."""

    id: str
    day: str
    model: str
    resident_kb_s: int
    starting_kb_s: int
    resident_nano_usd: int
    price_book: str


def day_of(unix_s: float) -> str:
    """The UTC day that a request is billed on: the day it finished."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d")


_TABLES = {Entry: REQUESTS, KeepAlive: KEEP_ALIVE}


class EntryInserts:
    """INSERT statements in a database's own words: one for all rows of a table.

    Given to the driver as they are: with SQLAlchemy's execution of one row a commit would cost five
    times as much processor time. A statement a row would make the thread that writes give the
    interpreter up and wait for it again at each row. A row that is there already, after a commit
    whose answer was lost, is kept.
    """

    def __init__(self, engine: Engine) -> None:
        self._marker = "?" if engine.dialect.paramstyle == "qmark" else "%s"

    def write(self, connection: Connection, entries: Sequence[Entry | KeepAlive]) -> None:
        """Insert up to `MOST_AT_ONCE` rows; the caller commits."""
        for kind, table in _TABLES.items():
            rows = [astuple(entry) for entry in entries if type(entry) is kind]
            if rows:
                statement = _insert(table.name, kind, len(rows), self._marker)
                connection.exec_driver_sql(statement, tuple(chain.from_iterable(rows)))


@lru_cache(maxsize=MOST_AT_ONCE)
def _insert(table: str, kind: type[Entry | KeepAlive], rows: int, marker: str) -> str:
    columns = kind.__struct_fields__
    row = f"({', '.join([marker] * len(columns))})"
    values = ", ".join([row] * rows)
    names = ", ".join(columns)
    return f"INSERT INTO {table} ({names}) VALUES {values} ON CONFLICT DO NOTHING"  # noqa: S608  # our own names


def write_entries(connection: Connection, entries: Sequence[Entry | KeepAlive]) -> None:
    """Insert a few rows once."""
    EntryInserts(connection.engine).write(connection, entries)
