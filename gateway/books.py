"""The gateway's side of the books: opened with the service, written to before a last byte leaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable

import structlog
from sqlalchemy import Engine

from gateway.key_ring import Caller, KeyRing
from gateway.residency import ResidentMeter
from remoe.accounts.entries import ANONYMOUS, Entry, KeepAlive, day_of
from remoe.accounts.keys import list_keys
from remoe.accounts.writer import LedgerUnavailableError, LedgerWriter, OnFailure
from remoe.money import kb_s, price
from remoe.prices import PriceBook

__all__ = ["Books"]

_log = structlog.get_logger()
_KEEP_ALIVE_PERIOD_S = 60.0


class Books:
    """The ledger's writer and the key ring; without an engine, nothing is written and nobody known."""

    def __init__(
        self,
        engine: Engine | None,
        *,
        model: str,
        prices: PriceBook,
        resident: ResidentMeter,
        on_failure: OnFailure = "refuse",
        patience_s: float = 5.0,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.wall_clock = wall_clock
        self.writer: LedgerWriter | None = None
        self._engine = engine
        self._model = model
        self._prices = prices
        self._resident = resident
        self._on_failure = on_failure
        self._patience_s = patience_s
        self._keys: KeyRing | None = None
        self._callers: dict[str, Caller] = {}

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Write from inside this block; what waits at its end is written first."""
        if self._engine is None:
            yield
            return
        self._keys = KeyRing(self._engine, wall_clock=self.wall_clock)
        self.writer = LedgerWriter(
            self._engine, on_failure=self._on_failure, patience_s=self._patience_s
        )
        keeper = asyncio.create_task(self._record_keep_alive())
        try:
            yield
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            await self._write_keep_alive()
            await self.writer.close()

    @property
    def refuses(self) -> bool:
        return self.writer is not None and self.writer.refuses

    def has_keys(self) -> bool:
        """Whether anybody could come in with a key; reads the ledger."""
        return self._engine is not None and bool(list_keys(self._engine))

    async def find(self, secret: str) -> Caller | None:
        if self._keys is None:
            return None
        caller = await self._keys.find(secret)
        if caller is not None:
            self._callers[caller.key.id] = caller
        return caller

    async def record(self, entry: Entry) -> None:
        """Return when the entry is safe; raises LedgerUnavailableError if it will not be."""
        if self.writer is not None:
            await self.writer.record(entry)
        if entry.key_id != ANONYMOUS and (caller := self._callers.get(entry.key_id)):
            caller.used(
                tokens=entry.prompt_tokens + entry.completion_tokens,
                nano_usd=entry.total_nano_usd,
                day=entry.day,
            )

    async def _record_keep_alive(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_ALIVE_PERIOD_S)
            await self._write_keep_alive()

    async def _write_keep_alive(self) -> None:
        held = self._resident.take_keep_alive()
        held_kb_s = kb_s(held.total_gb_s)
        if held_kb_s == 0 or self.writer is None:
            return
        row = KeepAlive(
            id=uuid.uuid4().hex,
            day=day_of(self.wall_clock()),
            model=self._model,
            resident_kb_s=held_kb_s,
            starting_kb_s=kb_s(held.starting_gb_s),
            resident_nano_usd=price(held_kb_s, self._prices.cpu_usd_per_gb_s),
            price_book=self._prices.name,
        )
        try:
            await self.writer.record(row)
        except LedgerUnavailableError:
            _log.warning("keep_alive_not_recorded", resident_kb_s=held_kb_s)
