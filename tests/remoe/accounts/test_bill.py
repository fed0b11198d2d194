"""Bills equal the sum of their requests to the last digit, in SQLite and in PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, update

from remoe.accounts.bill import BillLine, make_bill, spent_nano_usd
from remoe.accounts.database import open_database
from remoe.accounts.entries import Entry, KeepAlive, day_of, write_entries
from remoe.accounts.keys import create_key
from remoe.accounts.schema import SCHEMA
from remoe.errors import SettingsError
from tests.remoe.accounts.rows import entry

_AMOUNTS = st.integers(0, 10**13)
_ENTRIES = st.lists(
    st.builds(
        lambda **values: values,
        day=st.sampled_from(["2026-01-01", "2026-01-02"]),
        key_id=st.sampled_from(["-", "key-a", "key-b"]),
        model=st.sampled_from(["one", "two"]),
        main_cpu_kb_s=_AMOUNTS,
        main_cpu_nano_usd=_AMOUNTS,
        total_nano_usd=_AMOUNTS,
        prompt_tokens=_AMOUNTS,
        metered=st.booleans(),
    ),
    max_size=30,
)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=_ENTRIES)
def test_lines_and_total_are_the_sum_of_the_requests(
    engine: Engine, rows: list[dict[str, object]]
) -> None:
    from remoe.accounts.schema import REQUESTS

    entries = [entry(f"r{number}", **values) for number, values in enumerate(rows)]
    with engine.begin() as connection:
        connection.execute(REQUESTS.delete())
        write_entries(connection, list(entries))
    for by in ("key", "model", "day"):
        bill = make_bill(engine, by=by)
        assert bill.total == _summed("total", entries)
        field = {"key": "key_id"}.get(by, by)
        names = sorted({getattr(row, field) for row in entries})
        assert bill.lines == [
            _summed(name, [row for row in entries if getattr(row, field) == name]) for name in names
        ]


def _summed(name: str, entries: list[Entry]) -> BillLine:
    sums = {
        field: sum(getattr(row, field) or 0 for row in entries)
        for field in BillLine.__struct_fields__
        if field not in {"name", "requests", "unmetered"}
    }
    return BillLine(
        name=name,
        requests=len(entries),
        unmetered=sum(not row.metered for row in entries),
        **sums,
    )


def test_a_bill_of_some_days(engine: Engine) -> None:
    with engine.begin() as connection:
        write_entries(
            connection,
            [entry(day, day=day) for day in ("2026-01-01", "2026-01-02", "2026-01-03")],
        )
    assert [line.name for line in make_bill(engine, by="day", since="2026-01-02").lines] == [
        "2026-01-02",
        "2026-01-03",
    ]
    assert make_bill(engine, by="day", until="2026-01-01").total.requests == 1
    assert make_bill(engine, by="day", since="2027-01-01").lines == []


def test_keys_are_named_and_what_they_spent_today_is_known(engine: Engine) -> None:
    key, _ = create_key(engine, "ada")
    with engine.begin() as connection:
        write_entries(
            connection, [entry("a", key_id=key.id), entry("b"), entry("c", key_id=key.id)]
        )
    names = [line.name for line in make_bill(engine, by="key").lines]
    assert names == ["-", f"{key.id} ada"]
    assert spent_nano_usd(engine, "2025-11-24") == {"-": 15, key.id: 30}
    assert spent_nano_usd(engine, "2025-11-25") == {}


def test_keep_alive_is_in_no_line(engine: Engine) -> None:
    idle = KeepAlive(
        id="k",
        day="2026-01-01",
        model="m",
        resident_kb_s=7,
        starting_kb_s=0,
        resident_nano_usd=9,
        price_book="p",
    )
    with engine.begin() as connection:
        write_entries(connection, [idle])
    bill = make_bill(engine, by="day")
    assert (bill.keep_alive_kb_s, bill.keep_alive_nano_usd) == (7, 9)
    assert bill.total.resident_kb_s == 0


def test_a_row_written_twice_counts_once(engine: Engine) -> None:
    for _ in range(2):
        with engine.begin() as connection:
            write_entries(connection, [entry("same")])
    assert make_bill(engine, by="day").total.requests == 1


def test_the_day_is_utc_s() -> None:
    late = datetime(2026, 3, 1, 23, 59, 59, tzinfo=UTC).timestamp()
    assert (day_of(late), day_of(late + 1)) == ("2026-03-01", "2026-03-02")


def test_a_ledger_of_another_version_is_refused(ledger_url: str) -> None:
    engine = open_database(ledger_url)
    with engine.begin() as connection:
        connection.execute(update(SCHEMA).values(version=99))
    engine.dispose()
    with pytest.raises(SettingsError, match="schema version 99"):
        open_database(ledger_url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "is not a database URL"),
        ("mysql://u:secret@h/d", r"SQLite file or a PostgreSQL database, not mysql://u:\*\*\*@h/d"),
        ("sqlite://", "SQLite file or"),
        ("sqlite:////proc/no/ledger.db", "cannot make /proc/no"),
        ("postgresql://u:secret@127.0.0.1:9/d", r"cannot use the ledger postgresql.*\*\*\*"),
    ],
)
def test_a_bad_url_says_what_to_do_and_no_password(url: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        open_database(url)
    assert "secret" not in caught.value.message


def test_commands_do_not_make_a_ledger_where_none_is(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no ledger"):
        open_database(f"sqlite:///{tmp_path / 'none.db'}", create=False)
    assert not (tmp_path / "none.db").exists()
