"""The line of a prompt's length and the time to its first token, learned from requests.

A pass reads its weights whatever the prompt's length, and what stands around it takes its time too.
A rate alone, learned from a prompt of a few tokens, makes a hundred tokens take a hundred times that.
"""

from __future__ import annotations

import numpy as np

__all__ = ["PrefillTime"]

# Lengths whose standard deviation is below this share of their mean do not show a slope.
_SAME_LENGTH = 0.05


class PrefillTime:
    """Least squares over moving averages: `fixed_s` and `s_per_token`, neither below 0.

    `adaptation` is the weight of the newest request, as it is in the planner's other averages. Until
    lengths differ all time is taken for the tokens'.
    """

    def __init__(self, adaptation: float) -> None:
        self._adaptation = adaptation
        self._moments: np.ndarray | None = None  # means of n, t, n², n·t

    def add(self, tokens: int, seconds: float) -> None:
        sample = np.array([tokens, seconds, tokens**2, tokens * seconds])
        if self._moments is None:
            self._moments = sample
        else:
            self._moments += self._adaptation * (sample - self._moments)

    @property
    def line(self) -> tuple[float, float] | None:
        """(`fixed_s`, `s_per_token`), None before the first request."""
        if self._moments is None:
            return None
        tokens, seconds, squares, products = map(float, self._moments)
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
