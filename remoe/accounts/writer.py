"""Group commit: requests that end while a commit is under way share the next one.

One thread owns the connection. `record` returns when the row is on the disk, so whoever waits for
it before the last byte loses nothing that a client has been told (docs/adr/0010-exact-durable-ledger.md).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import structlog
from sqlalchemy import Connection, Engine, update
from sqlalchemy.exc import SQLAlchemyError

from remoe.accounts.entries import MOST_AT_ONCE, Entry, EntryInserts, KeepAlive
from remoe.accounts.schema import SCHEMA
from remoe.errors import UnavailableError

__all__ = ["LedgerUnavailableError", "LedgerWriter", "OnFailure"]

_log = structlog.get_logger()
OnFailure = Literal["refuse", "serve"]
# Changes nothing, and still has to be written to the disk.
_PROBE = update(SCHEMA).values(version=SCHEMA.c.version)


class LedgerUnavailableError(UnavailableError):
    """The request was not written down, so its answer is not given and nothing is billed."""

    code = "ledger_unavailable"


@dataclass(eq=False, slots=True)
class _Row:
    entry: Entry | KeepAlive
    settled: asyncio.Future[bool]
    """Whether its answer may be given: the row is on the disk, or is kept until it can be."""
    given_up_at: float
    given_up: bool = False
    """Nobody will wait for another try, so a failing commit drops the row."""


class LedgerWriter:
    """Writes rows from one event loop.

    `on_failure` decides what happens while nothing can be written (a full disk, a lost server):
    "refuse" gives up the request after `patience_s` and forgets its row; "serve" lets the request
    go and keeps its row in memory, up to `most_kept` rows, until it can be written. Commits are at
    least `interval_s` apart, which bounds what they cost however many requests there are.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_failure: OnFailure = "refuse",
        patience_s: float = 5.0,
        most_kept: int = 100_000,
        retry_s: float = 1.0,
        interval_s: float = 0.02,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._inserts = EntryInserts(engine)
        self._on_failure = on_failure
        self._patience_s = patience_s
        self._most_kept = most_kept
        self._retry_s = retry_s
        self._interval_s = interval_s
        self._committed_at = clock() - interval_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Row] = []
        # In order of arrival, from the first that is not settled; looked at when its time is up.
        self._asking: deque[_Row] = deque()
        self._patience: asyncio.TimerHandle | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._failing_since: float | None = None
        self.lost = 0
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Rows not written yet."""
        return len(self._waiting)

    @property
    def failing(self) -> bool:
        """Whether the last commit failed."""
        return self._failing_since is not None

    @property
    def refuses(self) -> bool:
        """Whether new requests should not be begun, for they could not be written down."""
        return self.failing and self._on_failure == "refuse"

    async def record(self, entry: Entry | KeepAlive) -> None:
        """Return when the row is safe, or raises LedgerUnavailableError if it will not be."""
        row = _Row(entry, self._loop.create_future(), self._loop.time() + self._patience_s)
        with self._changed:
            if self._closing:
                raise LedgerUnavailableError("The server is stopping. Send the request again.")
            if self.pending >= self._most_kept:
                self.lost += 1
                _log.error("ledger_row_lost", id=entry.id, kept=self.pending)
                return
            self._waiting.append(row)
            self._changed.notify()
        if self._on_failure == "serve" and self.failing:
            return
        self._asking.append(row)
        if self._patience is None:
            self._patience = self._loop.call_at(row.given_up_at, self._lose_patience)
        if not await row.settled:
            raise LedgerUnavailableError(
                "The request could not be written to the ledger, so it was given up and costs "
                "nothing. Try again later.",
                retry_after_s=30,
            )

    def _lose_patience(self) -> None:
        """Settle the rows whose time is up; one timer for all, since as a rule there are none."""
        self._patience = None
        while self._asking and self._asking[0].given_up_at <= self._loop.time():
            row = self._asking.popleft()
            if row.settled.done():
                continue
            if self._on_failure == "serve":
                row.settled.set_result(True)
            elif self._forget(row):
                row.settled.set_result(False)
            # Else it is just being written, and will be settled by how that goes.
        if self._asking:
            self._patience = self._loop.call_at(self._asking[0].given_up_at, self._lose_patience)

    async def close(self) -> None:
        """Write what waits, as far as that works now, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        if self._patience is not None:
            self._patience.cancel()
        for row in self._asking:
            if not row.settled.done():
                row.settled.set_result(self._on_failure == "serve")
        self._engine.dispose()

    def _forget(self, row: _Row) -> bool:
        """Take a row back; False if it is just being written."""
        with self._changed:
            row.given_up = True
            before = len(self._waiting)
            self._waiting = [kept for kept in self._waiting if kept is not row]
            return len(self._waiting) < before

    def _run(self) -> None:
        connection: Connection | None = None
        while (rows := self._take()) is not None:
            try:
                connection = connection or self._connect()
                if rows:
                    self._inserts.write(connection, [row.entry for row in rows])
                else:
                    connection.execute(_PROBE)
                connection.commit()  # for SQLAlchemy: each statement was committed by itself
            except SQLAlchemyError as error:
                if connection is not None:
                    # Nothing of it may live on: the rows may be forgotten meanwhile.
                    connection.invalidate()
                    connection.close()
                connection = None
                self._failed(rows, error)
            else:
                self._committed_at = self._clock()
                self._worked()
                self._tell(rows, written=True)
        if connection is not None:
            connection.close()

    def _connect(self) -> Connection:
        """One that commits each statement, of which a group of rows is one.

        The thread gives the interpreter up for each call of the database, and may wait for it while
        the event loop is busy: BEGIN and COMMIT would be two more.
        """
        return self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _take(self) -> list[_Row] | None:
        """The next rows to write; none of them to see whether writing works again; None to end."""
        with self._changed:
            if self.failing:
                self._changed.wait_for(lambda: self._closing, timeout=self._retry_s)
            else:
                self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing and not self._waiting:
                return None
        # Those that end in the next moments go along; after a quiet time nobody waits.
        time.sleep(max(0.0, self._committed_at + self._interval_s - self._clock()))
        with self._changed:
            # Of one table, so that they are written all or none.
            kinds = groupby(self._waiting[:MOST_AT_ONCE], lambda row: type(row.entry))
            rows = next((list(rows) for _, rows in kinds), [])
            self._waiting = self._waiting[len(rows) :]
        return rows

    def _failed(self, rows: list[_Row], error: SQLAlchemyError) -> None:
        """Keep the rows for another time, or lose them if there will be none."""
        reason = str(getattr(error, "orig", None) or error)[:300]
        if self._failing_since is None:
            self._failing_since = self._clock()
            _log.error("ledger_failing", reason=reason, on_failure=self._on_failure)
        with self._changed:
            given_up = [row for row in rows if row.given_up]
            self._waiting = [*(row for row in rows if not row.given_up), *self._waiting]
            if self._closing:
                self.lost += len(self._waiting)
                self._waiting = []
                _log.error("ledger_rows_lost", rows=self.lost, reason=reason)
        self._tell(given_up, written=False)

    def _worked(self) -> None:
        if self._failing_since is not None:
            after_s = round(self._clock() - self._failing_since, 1)
            _log.warning("ledger_works_again", after_s=after_s)
            self._failing_since = None

    def _tell(self, rows: Sequence[_Row], *, written: bool) -> None:
        def tell() -> None:
            for row in rows:
                if not row.settled.done():
                    row.settled.set_result(written)
            while self._asking and self._asking[0].settled.done():
                self._asking.popleft()

        # One wake-up of the loop for the whole group. It may have ended meanwhile.
        if rows and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell)
