"""Small jobs nobody waits for: bounded in number, and given a moment at shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

__all__ = ["Background"]


class Background:
    """Runs coroutines that handle their own errors; drops new ones when too many run."""

    def __init__(self, *, limit: int = 256) -> None:
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, job: Coroutine[object, object, None]) -> bool:
        """Run a job soon; False if it was dropped."""
        if len(self._tasks) >= self._limit:
            job.close()
            return False
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def close(self, *, grace_s: float = 2.0) -> None:
        """Let running jobs finish for a moment, then cancel the rest."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=grace_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
