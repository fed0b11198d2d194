"""Bills: exact sums over the ledger's rows, by key, model or day."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, Engine, Select, and_, case, func, select, true

from remoe.accounts.schema import KEEP_ALIVE, KEYS, REQUESTS

__all__ = ["Bill", "BillLine", "Grouping", "make_bill", "spent_nano_usd"]

Grouping = Literal["key", "model", "day"]


class BillLine(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over requests. `unmetered` requests have no amounts: nobody could say what they used.

    `resident_*` is memory held times time, as shared out to the requests: null if unknown.
    """

    name: str
    requests: int
    unmetered: int
    prompt_tokens: int
    completion_tokens: int
    main_gpu_kb_s: int
    main_cpu_kb_s: int
    remote_kb_s: int
    main_gpu_nano_usd: int
    main_cpu_nano_usd: int
    remote_nano_usd: int
    total_nano_usd: int
    resident_kb_s: int
    resident_nano_usd: int


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """`keep_alive_*` is memory held while there was no request: part of no line and no total."""

    by: Grouping
    since: str | None
    until: str | None
    lines: list[BillLine]
    total: BillLine
    keep_alive_kb_s: int
    keep_alive_nano_usd: int


_SUMS = [
    column
    for column in BillLine.__struct_fields__
    if column not in {"name", "requests", "unmetered"}
]


def make_bill(
    engine: Engine, *, by: Grouping, since: str | None = None, until: str | None = None
) -> Bill:
    """Add the rows up; `since` and `until` are UTC days, both included."""
    group = {"key": REQUESTS.c.key_id, "model": REQUESTS.c.model, "day": REQUESTS.c.day}[by]
    within = _within(REQUESTS.c.day, since, until)
    with engine.connect() as connection:
        lines = [
            _line(row.name, row._mapping)  # noqa: SLF001  # SQLAlchemy's public name for it
            for row in connection.execute(_query(group, within).order_by(group))
        ]
        (total,) = connection.execute(_query(None, within))
        idle = connection.execute(
            select(
                func.coalesce(func.sum(KEEP_ALIVE.c.resident_kb_s), 0),
                func.coalesce(func.sum(KEEP_ALIVE.c.resident_nano_usd), 0),
            ).where(_within(KEEP_ALIVE.c.day, since, until))
        ).one()
        names = (
            {row.id: row.name for row in connection.execute(select(KEYS.c.id, KEYS.c.name))}
            if by == "key"
            else {}
        )
    return Bill(
        by=by,
        since=since,
        until=until,
        lines=[
            msgspec.structs.replace(line, name=f"{line.name} {names[line.name]}")
            if line.name in names
            else line
            for line in lines
        ],
        total=_line("total", total._mapping),  # noqa: SLF001
        keep_alive_kb_s=int(idle[0]),
        keep_alive_nano_usd=int(idle[1]),
    )


def spent_nano_usd(engine: Engine, day: str) -> dict[str, int]:
    """What each key has spent on a UTC day."""
    query = (
        select(REQUESTS.c.key_id, func.sum(REQUESTS.c.total_nano_usd))
        .where(REQUESTS.c.day == day)
        .group_by(REQUESTS.c.key_id)
    )
    with engine.connect() as connection:
        return {key: int(total) for key, total in connection.execute(query)}


def _query(
    group: ColumnElement[str] | None, within: ColumnElement[bool]
) -> Select[tuple[object, ...]]:
    columns: list[ColumnElement[Any]] = [
        func.count().label("requests"),
        func.coalesce(func.sum(case((REQUESTS.c.metered, 0), else_=1)), 0).label("unmetered"),
        *(func.coalesce(func.sum(REQUESTS.c[name]), 0).label(name) for name in _SUMS),
    ]
    if group is None:
        return select(*columns).where(within)
    return select(group.label("name"), *columns).where(within).group_by(group)


def _line(name: str, sums: object) -> BillLine:
    # PostgreSQL sums integers to its exact decimal type, SQLite to an integer.
    assert hasattr(sums, "__getitem__")  # noqa: S101  # SQLAlchemy's RowMapping
    return BillLine(
        name=name,
        requests=int(sums["requests"]),
        unmetered=int(sums["unmetered"]),
        **{field: int(sums[field]) for field in _SUMS},
    )


def _within(day: ColumnElement[str], since: str | None, until: str | None) -> ColumnElement[bool]:
    return and_(
        true(),
        *([day >= since] if since else []),
        *([day <= until] if until else []),
    )
