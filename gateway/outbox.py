"""Messages that nobody waits for and nobody wants to lose: sent in order, again after a failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import structlog

__all__ = ["Outbox", "UndeliverableError"]

_log = structlog.get_logger()
_Message = TypeVar("_Message")


class UndeliverableError(Exception):
    """The other side will never take this message."""


class Outbox(Generic[_Message]):
    """A bounded queue with one sender, which raises whatever kept it from delivering.

    After a failure it waits, twice as long each time up to `longest_pause_s`, and sends the same
    message again. When the queue is full the oldest message is given up: the newest says most.
    """

    def __init__(
        self,
        deliver: Callable[[_Message], Awaitable[None]],
        *,
        name: str,
        limit: int = 1024,
        first_pause_s: float = 0.5,
        longest_pause_s: float = 30.0,
    ) -> None:
        self._deliver = deliver
        self._name = name
        self._limit = limit
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._waiting: deque[_Message] = deque()
        self._lost = 0
        self._sender: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Messages that are not delivered yet."""
        return len(self._waiting)

    def put(self, message: _Message) -> None:
        """Send it soon; to be called from the event loop."""
        if len(self._waiting) >= self._limit:
            # Not the first: that may be on its way just now.
            del self._waiting[1 if self._limit > 1 else 0]
            self._lost += 1
            if self._lost == 1:
                _log.warning("outbox_full", outbox=self._name, limit=self._limit)
        self._waiting.append(message)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.get_running_loop().create_task(self._send())

    async def close(self, *, grace_s: float = 2.0) -> None:
        """Send what can be sent in a moment; what is left is lost, and counted in the log."""
        if self._sender is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await asyncio.shield(self._sender)
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
        if lost := self._lost + len(self._waiting):
            _log.warning("outbox_lost", outbox=self._name, messages=lost)

    async def _send(self) -> None:
        pause_s = self._first_pause_s
        while self._waiting:
            message = self._waiting[0]
            try:
                await self._deliver(message)
            except UndeliverableError as error:
                _log.warning("undeliverable", outbox=self._name, reason=str(error))
            except Exception as error:  # noqa: BLE001  # whatever it is, it may pass
                _log.warning(
                    "delivery_failed", outbox=self._name, reason=repr(error), again_in_s=pause_s
                )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._longest_pause_s)
                continue
            pause_s = self._first_pause_s
            if self._waiting and self._waiting[0] is message:
                self._waiting.popleft()
