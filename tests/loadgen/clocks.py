"""A clock that jumps: time passes only when everybody waits."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Coroutine
from itertools import count
from typing import Any

__all__ = ["JumpingClock"]

# Passes through the loop after which every task that can run has run.
_ROUNDS = 25


class JumpingClock:
    """`run` drives a coroutine; `spend` makes the time of a busy processor pass."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now

    def spend(self, seconds: float) -> None:
        self._now += seconds

    async def sleep_until(self, moment: float) -> None:
        if moment > self._now:
            woken = asyncio.get_running_loop().create_future()
            heapq.heappush(self._sleepers, (moment, next(self._order), woken))
            await woken

    async def sleep(self, seconds: float) -> None:
        await self.sleep_until(self._now + seconds)

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run(self._drive(work))

    async def _drive(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(_ROUNDS):
                await asyncio.sleep(0)
            if task.done() or not self._sleepers:
                continue
            moment, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                self._now = max(self._now, moment)
                woken.set_result(None)
        await task
