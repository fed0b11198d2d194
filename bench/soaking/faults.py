"""What breaks while a soak asks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter

from tests.e2e.platform import Platform

__all__ = ["Faults"]

_MAIN_LIVES_S = 60.0


class Faults:
    """Something breaks every few seconds; most often what there is most of."""

    def __init__(self, platform: Platform, every_s: float) -> None:
        self.done: Counter[str] = Counter()
        self._platform = platform
        self._every_s = every_s
        self._main_killed_at = time.monotonic()
        self._choices = {
            "experts killed": 10,
            "experts frozen": 6,
            "half-sent requests": 3,
            "planner killed": 2,
            "main function killed": 1,
        }

    async def run(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * self._every_s)
            (name,) = random.choices(list(self._choices), list(self._choices.values()))
            if name == "main function killed":
                # One that is killed again and again as it starts is given up, with 503s.
                if time.monotonic() - self._main_killed_at < _MAIN_LIVES_S:
                    continue
                self._main_killed_at = time.monotonic()
            self.done[name] += 1
            with contextlib.suppress(OSError):
                await self._strike(name)

    async def _strike(self, name: str) -> None:
        pids = self._platform.pids_of
        if name == "experts killed":
            _signal(random.sample(found, 1) if (found := pids("expert_fn")) else [], signal.SIGKILL)
        elif name == "experts frozen":
            frozen = pids("expert_fn")
            _signal(frozen, signal.SIGSTOP)
            try:
                await asyncio.sleep(0.3)
            finally:
                _signal(frozen, signal.SIGCONT)
        elif name == "half-sent requests":
            for _ in range(20):
                _, writer = await asyncio.open_connection("127.0.0.1", self._platform.port)
                writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-len")
                await writer.drain()
                writer.close()
        else:
            module = "planner" if name == "planner killed" else "main_model_fn"
            _signal(pids(module), signal.SIGKILL)


def _signal(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
