"""What is written down of one request."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import msgspec
from sqlalchemy import Connection, Engine
from sqlalchemy.dialects import postgresql, sqlite

from remoe.accounts.schema import KEEP_ALIVE, REQUESTS

__all__ = ["ANONYMOUS", "Entry", "EntryInserts", "KeepAlive", "Outcome", "day_of", "write_entries"]

# The key of requests that came without one.
ANONYMOUS = "-"

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


class EntryInserts:
    """The two INSERT statements in a database's own words, compiled once.

    Given to the driver as they are: with SQLAlchemy's execution of one row a commit would cost five
    times as much processor time. A row that is there already, after a commit whose answer was
    lost, is kept.
    """

    def __init__(self, engine: Engine) -> None:
        postgres = engine.dialect.name == "postgresql"
        insert = postgresql.insert if postgres else sqlite.insert
        self._statements = {
            kind: insert(table).on_conflict_do_nothing().compile(dialect=engine.dialect)
            for kind, table in ((Entry, REQUESTS), (KeepAlive, KEEP_ALIVE))
        }

    def write(self, connection: Connection, entries: Sequence[Entry | KeepAlive]) -> None:
        """Insert rows; the caller commits."""
        for kind, statement in self._statements.items():
            rows = [entry for entry in entries if type(entry) is kind]
            if not rows:
                continue
            if statement.positiontup is None:
                named = [msgspec.structs.asdict(row) for row in rows]
                connection.exec_driver_sql(statement.string, named)
            else:
                order = statement.positiontup
                tuples = [tuple(getattr(row, name) for name in order) for row in rows]
                connection.exec_driver_sql(statement.string, tuples)


def write_entries(connection: Connection, entries: Sequence[Entry | KeepAlive]) -> None:
    """Insert a few rows once."""
    EntryInserts(connection.engine).write(connection, entries)
