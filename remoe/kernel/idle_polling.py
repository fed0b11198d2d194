"""Waiting for another process of this machine while processors stay awake (native/idle_polling.c)."""

from __future__ import annotations

import math
import time
from pathlib import Path

from remoe.kernel.interface import KernelUnavailableError
from remoe.kernel.native import LIBRARY
from remoe.kernel.native_library import open_library

__all__ = ["IdlePolling"]

# Two processes that wait for each other use a few of them.
_MOST_PROCESSORS = 8
# After each message: longer than it takes until the next one, while tokens are decoded.
_AWAKE_S = 0.004
# After the threads had no processor: others need them all.
_REST_S = 1.0
_MISSED = 2  # as in native/idle_polling.c


class IdlePolling:
    """Threads of the lowest priority, one a processor, that look for what another thread waits for.

    A virtual processor that halts takes 50 to 100 us to go on, and who sends to a thread asleep on
    another processor pays for waking it. To the scheduler a processor on which only they
    run is idle: whoever is woken there gets it at once. They are made when they are first
    needed; where there are none (no library, another system) every wait is over at once. To be used
    from one thread.
    """

    def __init__(self, library: Path = LIBRARY) -> None:
        self._path = library
        self._handle: int | None = None
        self._until = self._rests_until = -math.inf
        self._usable = True

    def stay_awake(self, now: float) -> None:
        """For the next few milliseconds; `now` is `time.monotonic()`."""
        if self._until - now < _AWAKE_S / 2 and now >= self._rests_until and self._opened():
            self._until = now + _AWAKE_S
            self._library.remoe_polling_for(self._handle, int(_AWAKE_S * 1e9))

    def handle(self, now: float) -> int | None:
        """The threads for who waits in the library itself; None while they rest."""
        return self._handle if now >= self._rests_until and self._opened() else None

    def rest(self, now: float) -> None:
        """Do without them for a while: they had no processor."""
        self._until, self._rests_until = -math.inf, now + _REST_S

    def wait(self, descriptor: int, timeout_s: float) -> bool:
        """Whether there may be something to read; False after `timeout_s`, or once asleep."""
        if time.monotonic() >= self._until:
            return False
        timeout_ns = int(min(timeout_s, _AWAKE_S) * 1e9)
        found: int = self._library.remoe_polling_wait(self._handle, descriptor, timeout_ns)
        if found == _MISSED:
            self.rest(time.monotonic())
        return bool(found)

    def close(self) -> None:
        """End the threads."""
        if self._handle is not None:
            self._library.remoe_polling_close(self._handle)
        self._handle, self._until, self._usable = None, -math.inf, False

    def _opened(self) -> bool:
        if self._handle is None and self._usable:
            try:
                self._library = open_library(self._path)
                self._handle = self._library.remoe_polling_open(_MOST_PROCESSORS)
            except KernelUnavailableError:
                pass  # whoever computes says so
            self._usable = self._handle is not None
        return self._usable
