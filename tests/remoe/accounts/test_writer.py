"""Group commit: durable when it returns, whole after kill -9, and honest when nothing can be written."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from remoe.accounts.bill import make_bill
from remoe.accounts.database import open_database
from remoe.accounts.writer import LedgerUnavailableError, LedgerWriter
from tests.remoe.accounts.rows import entry


@contextmanager
def full_disk(engine: Engine) -> Iterator[None]:
    """SQLite's own "database or disk is full", from its own limit on pages."""
    pages = engine.connect().exec_driver_sql("PRAGMA page_count").scalar_one()

    def limit(connection: object) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")  # type: ignore[attr-defined]

    event.listen(engine, "begin", limit)
    try:
        yield
    finally:
        event.remove(engine, "begin", limit)
        event.listen(
            engine, "begin", lambda c: c.exec_driver_sql("PRAGMA max_page_count=1073741823")
        )


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield engine
    engine.dispose()


def padded(name: str) -> dict[str, object]:
    """A row that cannot fit what is left of a page."""
    return {"model": name * 8000}


def test_rows_are_there_when_record_returns(engine: Engine) -> None:
    async def run() -> int:
        writer = LedgerWriter(engine)
        await asyncio.gather(*(writer.record(entry(f"r{number}")) for number in range(200)))
        written = make_bill(engine, by="day").total.requests
        await writer.close()
        return written

    assert asyncio.run(run()) == 200


def test_requests_that_end_together_share_a_commit(sqlite: Engine) -> None:
    commits = 0

    def count(connection: object) -> None:
        nonlocal commits
        commits += 1

    async def run() -> None:
        writer = LedgerWriter(sqlite)
        event.listen(sqlite, "commit", count)
        await asyncio.gather(*(writer.record(entry(f"r{number}")) for number in range(500)))
        await writer.close()

    asyncio.run(run())
    assert 1 <= commits <= 20


def test_close_writes_what_waits(sqlite: Engine) -> None:
    async def run() -> None:
        writer = LedgerWriter(sqlite)
        tasks = [asyncio.create_task(writer.record(entry(f"r{n}"))) for n in range(50)]
        await asyncio.sleep(0)
        await writer.close()
        await asyncio.gather(*tasks)
        with pytest.raises(LedgerUnavailableError, match="stopping"):
            await writer.record(entry("late"))

    asyncio.run(run())
    assert make_bill(sqlite, by="day").total.requests == 50


def test_a_full_disk_refuses_and_forgets(sqlite: Engine) -> None:
    async def run() -> None:
        writer = LedgerWriter(sqlite, patience_s=0.5, retry_s=0.02)
        await writer.record(entry("before"))
        with full_disk(sqlite):
            with pytest.raises(LedgerUnavailableError, match="costs nothing"):
                await writer.record(entry("unlucky", **padded("x")))
            assert (writer.failing, writer.refuses) == (True, True)
        # It notices by itself that the disk has room again: nobody else would try.
        async with asyncio.timeout(5):
            while writer.refuses:  # noqa: ASYNC110  # there is no event for it, on purpose
                await asyncio.sleep(0.005)
        await writer.record(entry("after", **padded("y")))
        assert not writer.failing
        await writer.close()

    asyncio.run(run())
    # What was not acknowledged is not billed.
    assert make_bill(sqlite, by="day").total.requests == 2


def test_a_row_given_up_while_its_commit_fails_is_not_tried_again(sqlite: Engine) -> None:
    """Its patience ends while the disk is being asked; the answer is then no, and final."""

    async def run() -> None:
        patience_over = threading.Event()
        writer = LedgerWriter(sqlite, patience_s=0.05, retry_s=0.02)
        with full_disk(sqlite):
            event.listen(sqlite, "begin", lambda _: patience_over.wait(10))
            asyncio.get_running_loop().call_later(0.3, patience_over.set)
            with pytest.raises(LedgerUnavailableError, match="costs nothing"):
                async with asyncio.timeout(5):
                    await writer.record(entry("unlucky", **padded("x")))
        await writer.close()

    asyncio.run(run())
    assert make_bill(sqlite, by="day").total.requests == 0


def test_a_full_disk_can_be_served_through(sqlite: Engine) -> None:
    async def run() -> None:
        writer = LedgerWriter(sqlite, on_failure="serve", patience_s=0.1, retry_s=0.02, most_kept=3)
        with full_disk(sqlite):
            for number in range(5):
                await writer.record(entry(f"r{number}", **padded("x")))
            assert not writer.refuses
            assert (writer.pending, writer.lost) == (3, 2)
        await writer.record(entry("after"))
        await writer.close()

    asyncio.run(run())
    assert make_bill(sqlite, by="day").total.requests == 3


_WRITE_FOREVER = """
import asyncio, sys
from remoe.accounts.database import open_database
from remoe.accounts.writer import LedgerWriter
from tests.remoe.accounts.rows import entry

async def one(writer, number):
    await writer.record(entry(f"r{number}"))
    print(number, flush=True)

async def main():
    writer = LedgerWriter(open_database(sys.argv[1]))
    for start in range(0, 10**9, 20):
        await asyncio.gather(*(one(writer, start + step) for step in range(20)))

asyncio.run(main())
"""


def test_kill_9_loses_nothing_that_was_acknowledged(ledger_url: str) -> None:
    told = []
    with subprocess.Popen(
        [sys.executable, "-c", _WRITE_FOREVER, ledger_url],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line.strip())
            if len(told) == 300:
                process.send_signal(signal.SIGKILL)
                break
        # What had left the process before it died was acknowledged too.
        told += [line.strip() for line in process.stdout if line.endswith("\n")]
    engine = open_database(ledger_url)
    with engine.connect() as connection:
        written = {row[0] for row in connection.exec_driver_sql("SELECT id FROM remoe_requests")}
    engine.dispose()
    assert {f"r{number}" for number in told} <= written
