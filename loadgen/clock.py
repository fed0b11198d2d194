"""Time, as the replay needs it: a monotonic now, and sleeping to a moment rather than for a while."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

__all__ = ["Clock", "MonotonicClock"]


class Clock(Protocol):
    def now(self) -> float:
        """Seconds of a monotonic clock."""
        ...

    async def sleep_until(self, moment: float) -> None:
        """Return at `moment` or as soon after as possible; at once if it is over."""
        ...


class MonotonicClock:
    def now(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, moment: float) -> None:
        left_s = moment - time.perf_counter()
        if left_s > 0:
            await asyncio.sleep(left_s)
