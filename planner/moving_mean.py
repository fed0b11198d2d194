"""Averages that follow what comes, and in the beginning are plain ones."""

from __future__ import annotations

__all__ = ["MovingMean"]


class MovingMean:
    """The newest sample weighs one in all there are, and `adaptation` once that is more.

    The first request is seldom like those that follow: it meets cold caches, and with the weight
    that it has as the only one it would be felt for dozens of requests. `value` is None before it.
    """

    def __init__(self, adaptation: float) -> None:
        self.value: float | None = None
        self._adaptation = adaptation
        self._count = 0

    def add(self, sample: float | None) -> None:
        """Take a sample in; None is a request that did not show it."""
        if sample is None:
            return
        self._count += 1
        weight = max(self._adaptation, 1 / self._count)
        before = self.value or 0.0
        self.value = before + weight * (sample - before)
