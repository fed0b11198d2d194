"""Who may ask, as the gateway knows it: keys, their limits, and what they spent today."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from gateway.limits import TokenBucket
from remoe.accounts.bill import spent_nano_usd
from remoe.accounts.entries import day_of
from remoe.accounts.keys import ApiKey, hash_key, list_keys
from remoe.errors import QuotaError, RateLimitError, TokenRateLimitError
from remoe.money import usd

__all__ = ["Caller", "KeyRing"]

_log = structlog.get_logger()
_REFRESH_S = 2.0
# From this age on they are read in passing, while requests go on with what is known.
_AHEAD_S = 1.0
# What strangers can make us read the keys at most, and how many of them we remember.
_UNKNOWN_REFRESH_S = 0.25
_MOST_STRANGERS = 1000
# Other gateways on the same ledger spend too; our own requests are counted at once.
_SPENT_REFRESH_S = 10.0


class Caller:
    """One key in use: its limits' state, and today's spending."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self.key = key
        self.requests = _bucket(key.requests_per_minute, clock)
        self.tokens = _bucket(key.tokens_per_minute, clock)
        self.spent_nano_usd = 0
        self.spent_day = ""

    def admit(self, unix_s: float) -> None:
        """Count one request; raises RateLimitError or QuotaError if it may not be made now."""
        key = self.key
        budget = key.nano_usd_per_day
        if budget is not None and self._spent(day_of(unix_s)) >= budget:
            raise QuotaError(
                f"The key '{key.name}' has spent its budget of ${usd(budget):g} for today. It may "
                f"ask again at {_midnight(unix_s)}; ask its owner to raise the budget."
            )
        if self.tokens is not None and (wait_s := self.tokens.wait_s()) > 0:
            raise TokenRateLimitError(
                f"Rate limit reached for '{key.name}' on tokens per minute: limit "
                f"{self.tokens.per_minute}. Try again in {wait_s:.1f} s.",
                retry_after_s=wait_s,
            )
        if self.requests is not None:
            if (wait_s := self.requests.wait_s()) > 0:
                raise RateLimitError(
                    f"Rate limit reached for '{key.name}' on requests per minute: limit "
                    f"{self.requests.per_minute}. Try again in {wait_s:.1f} s.",
                    retry_after_s=wait_s,
                )
            self.requests.charge(1)

    def used(self, *, tokens: int, nano_usd: int, day: str) -> None:
        """Charge what a request really took, once that is known."""
        if self.tokens is not None:
            self.tokens.charge(tokens)
        self._spent(day)
        self.spent_nano_usd += nano_usd

    def _spent(self, day: str) -> int:
        if day != self.spent_day:
            self.spent_day, self.spent_nano_usd = day, 0
        return self.spent_nano_usd


class KeyRing:
    """The active keys, read again every few seconds, so that a revoked one ends soon."""

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.wall_clock = wall_clock
        self._engine = engine
        self._clock = clock
        self._callers: dict[str, Caller] = {}
        self._read_at = -_REFRESH_S
        self._spent_at = -_SPENT_REFRESH_S
        self._reading = asyncio.Lock()
        self._ahead: asyncio.Task[None] | None = None
        # What came lately and is no key: clients must send something where nobody asks for one.
        self._strangers: set[str] = set()

    def __len__(self) -> int:
        return len(self._callers)

    async def find(self, secret: str) -> Caller | None:
        """The caller with this key. A revoked one is known for 2 s more at most."""
        digest = hash_key(secret)
        age_s = self._clock() - self._read_at
        if age_s >= _REFRESH_S:
            await self._refresh(_REFRESH_S)
        elif age_s >= _AHEAD_S and (self._ahead is None or self._ahead.done()):
            self._ahead = asyncio.create_task(self._refresh(_AHEAD_S))
        if digest not in self._callers and digest not in self._strangers:
            known_at = self._read_at
            await self._refresh(_UNKNOWN_REFRESH_S)  # it may have been made a moment ago
            asked = self._read_at > known_at
            if asked and digest not in self._callers and len(self._strangers) < _MOST_STRANGERS:
                self._strangers.add(digest)
        return self._callers.get(digest)

    async def _refresh(self, oldest_s: float) -> None:
        if self._clock() - self._read_at < oldest_s:
            return
        async with self._reading:
            if self._clock() - self._read_at < oldest_s:
                return
            spent_due = self._clock() - self._spent_at >= _SPENT_REFRESH_S
            day = day_of(self.wall_clock())
            try:
                keys, spent = await asyncio.to_thread(self._read, day if spent_due else None)
            except SQLAlchemyError as error:
                # Keys known before still open; nobody new comes in while the books are away.
                _log.error("cannot read the keys", reason=str(error)[:300])
            else:
                self._take(keys)
                self._strangers.clear()
                if spent is not None:
                    self._spent_at = self._clock()
                    for caller in self._callers.values():
                        caller.spent_day = day
                        caller.spent_nano_usd = spent.get(caller.key.id, 0)
            self._read_at = self._clock()

    def _read(self, day: str | None) -> tuple[list[ApiKey], dict[str, int] | None]:
        keys = list_keys(self._engine)
        budgets = any(key.nano_usd_per_day is not None for key in keys)
        return keys, spent_nano_usd(self._engine, day) if day and budgets else None

    def _take(self, keys: list[ApiKey]) -> None:
        before, self._callers = self._callers, {}
        for key in keys:
            known = before.get(key.sha256)
            same = known is not None and known.key == key
            self._callers[key.sha256] = known if same and known else Caller(key, self._clock)


def _bucket(per_minute: int | None, clock: Callable[[], float]) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, clock)


def _midnight(unix_s: float) -> str:
    tomorrow = datetime.fromtimestamp(unix_s, UTC).date() + timedelta(days=1)
    return f"{tomorrow.isoformat()}T00:00:00Z"
