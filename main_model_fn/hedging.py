"""When a reply is late enough to ask another replica as well.

A hedge after a high quantile of what calls take costs little and cuts the tail (Dean and Barroso,
The Tail at Scale, 2013). What calls take depends on their size, so each size has its own quantile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["HedgeDelay"]

_WINDOW = 64
_LEAST = 16
_QUANTILE = 0.95
# So much beyond the quantile: a machine that is merely busy slows its replicas alike.
_PATIENCE = 3.0
# Hedges per answered call, and how many may come at once: where everything is slow, a hedge makes
# it slower still.
_EARNED = 0.02
_MOST_EARNED = 3.0


@dataclass(slots=True)
class _Recent:
    """The last latencies of calls of about one size; the quantile is renewed every few calls."""

    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    since: int = 0
    quantile_s: float | None = None

    def add(self, latency_s: float) -> None:
        self.latencies_s.append(latency_s)
        self.since += 1
        if self.since >= _LEAST:
            self.since = 0
            ordered = sorted(self.latencies_s)
            self.quantile_s = ordered[int(_QUANTILE * (len(ordered) - 1))]


class HedgeDelay:
    """Of one function. Sizes are routes (rows times experts); classes of sizes double."""

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._recent: dict[int, _Recent] = {}
        self._earned = 1.0

    def record(self, routes: int, latency_s: float) -> None:
        """Note how long a call took that met neither cold start nor failure."""
        self._earned = min(self._earned + _EARNED, _MOST_EARNED)
        self._recent.setdefault(routes.bit_length(), _Recent()).add(latency_s)

    def spend(self) -> None:
        """Note a hedge."""
        self._earned -= 1

    def seconds(self, routes: int) -> float | None:
        """How long to wait for a reply before hedging.

        None while too little is known, or after as many hedges as the calls since have earned.
        A size not seen often enough is judged by the next smaller one: a call of twice the routes
        takes at most twice as long.
        """
        if self._earned < 1:
            return None
        size = routes.bit_length()
        for smaller in range(size, -1, -1):
            recent = self._recent.get(smaller)
            if recent is not None and recent.quantile_s is not None:
                scaled_s = recent.quantile_s * (1 << (size - smaller))
                return max(self._floor_s, _PATIENCE * scaled_s)
        return None
