"""The line of a prompt's length and the time to its first token, learned from requests.

A pass reads its weights whatever the prompt's length, and what stands around it takes its time too.
A rate alone, learned from a prompt of a few tokens, makes a hundred tokens take a hundred times that.
"""

from __future__ import annotations

from planner.moving_mean import MovingMean

__all__ = ["PrefillTime"]

# Lengths whose standard deviation is below this share of their mean do not show a slope.
_SAME_LENGTH = 0.05


class PrefillTime:
    """Least squares over moving averages: `fixed_s` and `s_per_token`, neither below 0.

    `adaptation` is as in the planner's other averages (moving_mean.py). Until lengths differ all
    time is taken for the tokens'.
    """

    def __init__(self, adaptation: float) -> None:
        self._tokens, self._seconds = MovingMean(adaptation), MovingMean(adaptation)
        self._squares, self._products = MovingMean(adaptation), MovingMean(adaptation)

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens.add(tokens)
        self._seconds.add(seconds)
        self._squares.add(tokens**2)
        self._products.add(tokens * seconds)

    @property
    def line(self) -> tuple[float, float] | None:
        """(`fixed_s`, `s_per_token`), None before the first request."""
        tokens, seconds = self._tokens.value, self._seconds.value
        squares, products = self._squares.value, self._products.value
        if tokens is None or seconds is None or squares is None or products is None:
            return None
        variance = squares - tokens**2
        if variance <= (_SAME_LENGTH * tokens) ** 2:
            return 0.0, seconds / tokens
        slope = (products - tokens * seconds) / variance
        fixed = seconds - slope * tokens
        if slope < 0:
            return seconds, 0.0
        if fixed < 0:
            return 0.0, products / squares
        return fixed, slope
