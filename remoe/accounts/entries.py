"""What is written down of one request."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import msgspec
from sqlalchemy import Connection, Insert
from sqlalchemy.dialects import postgresql, sqlite

from remoe.accounts.schema import KEEP_ALIVE, REQUESTS

__all__ = ["ANONYMOUS", "Entry", "KeepAlive", "Outcome", "day_of", "write_entries"]

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


def write_entries(connection: Connection, entries: list[Entry | KeepAlive]) -> None:
    """Insert rows; one that is there already, after a commit whose answer was lost, is kept."""
    statements = _POSTGRESQL if connection.dialect.name == "postgresql" else _SQLITE
    for kind, statement in statements.items():
        rows = [msgspec.structs.asdict(entry) for entry in entries if type(entry) is kind]
        if rows:
            connection.execute(statement, rows)


_SQLITE: dict[type[Entry | KeepAlive], Insert] = {
    Entry: sqlite.insert(REQUESTS).on_conflict_do_nothing(),
    KeepAlive: sqlite.insert(KEEP_ALIVE).on_conflict_do_nothing(),
}
_POSTGRESQL: dict[type[Entry | KeepAlive], Insert] = {
    Entry: postgresql.insert(REQUESTS).on_conflict_do_nothing(),
    KeepAlive: postgresql.insert(KEEP_ALIVE).on_conflict_do_nothing(),
}
