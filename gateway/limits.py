"""Token buckets: so many a minute, saved up to a minute's worth."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["TokenBucket", "reset_text"]

_MINUTE_S = 60.0


class TokenBucket:
    """`per_minute` units flow in evenly, and a full bucket holds a minute's worth.

    What was used may be charged afterwards, when it is known; the bucket is then in debt, and
    nothing is taken until that is paid.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    def wait_s(self, amount: float = 1.0) -> float:
        """How long until that much could be taken; 0 if now."""
        return max(0.0, amount - self._fill()) / self.per_minute * _MINUTE_S

    def charge(self, amount: float) -> None:
        """Take it, there or not."""
        self._fill()
        self._level -= amount

    @property
    def remaining(self) -> int:
        return max(0, int(self._fill()))

    @property
    def reset_s(self) -> float:
        """How long until the bucket is full."""
        return (self.per_minute - self._fill()) / self.per_minute * _MINUTE_S

    def _fill(self) -> float:
        now = self._clock()
        inflow = max(0.0, now - self._filled_at) * self.per_minute / _MINUTE_S
        self._level = min(float(self.per_minute), self._level + inflow)
        self._filled_at = now
        return self._level


def reset_text(seconds: float) -> str:
    """A duration as OpenAI writes it in x-ratelimit-reset-*: `250ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{round(seconds * 1e3)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:g}s"
