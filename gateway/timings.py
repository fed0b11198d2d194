"""How long things took lately, for what a waiting client is told: measured, or not said."""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["Timings"]

_REMEMBERED = 32


class Timings:
    """Medians of the latest cold starts, first tokens and whole answers, in seconds."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=_REMEMBERED)
        self._first_tokens: deque[float] = deque(maxlen=_REMEMBERED)
        self._services: deque[float] = deque(maxlen=_REMEMBERED)

    def started(self, seconds: float) -> None:
        """Note a cold start of the main function that a request waited for in full."""
        self._starts.append(seconds)

    def first_token(self, seconds: float) -> None:
        """Note the time from a main function's response headers to the first token."""
        self._first_tokens.append(seconds)

    def served(self, seconds: float) -> None:
        """Note the time a finished generation held its place, cold start excluded."""
        self._services.append(seconds)

    @property
    def start_s(self) -> float | None:
        return median(self._starts) if self._starts else None

    @property
    def first_token_s(self) -> float | None:
        return median(self._first_tokens) if self._first_tokens else None

    @property
    def service_s(self) -> float | None:
        return median(self._services) if self._services else None
