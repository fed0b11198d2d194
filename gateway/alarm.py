"""A limit on silence that is free while there is none: its timer is looked at when it is due.

`asyncio.timeout` around each wait of a stream makes and cancels a timer, a tenth of what a chunk
costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

__all__ = ["Alarm"]


class _Timers(Protocol):
    """What an event loop has."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle: ...


class Alarm:
    """Calls `ring` when `limit_s` have passed since `heard`, and again after each as long silence."""

    def __init__(
        self, limit_s: float, ring: Callable[[], None], *, loop: _Timers | None = None
    ) -> None:
        self._loop: _Timers = loop or asyncio.get_running_loop()
        self._limit_s = limit_s
        self._ring = ring
        self.heard()
        self._timer = self._loop.call_later(limit_s, self._look)

    def heard(self) -> None:
        self._heard_at = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._heard_at + self._limit_s - self._loop.time()
        due = left_s <= 0
        if due:
            self.heard()
            left_s = self._limit_s
        self._timer = self._loop.call_later(left_s, self._look)
        if due:
            self._ring()
