"""The line in front of the main function: bounded, and honest about how long it is.

A client that is turned away is told to come back after the median time an answer has taken lately,
when half of those now in line will have theirs, and after what is left of a cold start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.timings import Timings
from remoe.errors import QueueFullError, UnavailableError

__all__ = ["Line"]

_UNKNOWN_SERVICE_S = 2.0
_UNKNOWN_START_S = 10.0
# A running main function answers within milliseconds.
_WARM_S = 0.5
# Above two minutes OpenAI's clients give up at once.
_LONGEST_S = 60.0


class Line:
    """Counts the choices that wait or run; one event loop uses it."""

    def __init__(
        self, limit: int, timings: Timings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._timings = timings
        self._clock = clock
        self._open = 0
        self._starting: dict[int, float] = {}

    @property
    def cold(self) -> bool:
        """Whether somebody has waited for the main function longer than a running one takes."""
        return self._waited_s() > _WARM_S

    @contextmanager
    def place(self, choices: int) -> Iterator[None]:
        """Hold a place for each choice; raises QueueFullError, or UnavailableError while cold.

        A request alone in line is let in however many choices it has.
        """
        if self._open and self._open + choices > self._limit:
            raise self._full()
        self._open += choices
        try:
            yield
        finally:
            self._open -= choices

    @contextmanager
    def start(self) -> Iterator[None]:
        """Mark that a request waits for the main function to answer at all."""
        key = object()
        self._starting[id(key)] = self._clock()
        try:
            yield
        finally:
            del self._starting[id(key)]

    def retry_after_s(self) -> float:
        """When it makes sense to come back."""
        wait_s = self._timings.service_s or _UNKNOWN_SERVICE_S
        if self.cold:
            wait_s += max(0.0, (self._timings.start_s or _UNKNOWN_START_S) - self._waited_s())
        return min(max(wait_s, 1.0), _LONGEST_S)

    def _waited_s(self) -> float:
        return self._clock() - min(self._starting.values()) if self._starting else 0.0

    def _full(self) -> QueueFullError | UnavailableError:
        retry_after_s = self.retry_after_s()
        if self.cold:
            return UnavailableError(
                f"The model is starting and {self._open} answers wait for it, as many as this "
                "server holds. Try again later.",
                retry_after_s=retry_after_s,
            )
        return QueueFullError(
            f"{self._open} answers are under way, as many as this server holds. Try again later.",
            retry_after_s=retry_after_s,
        )
