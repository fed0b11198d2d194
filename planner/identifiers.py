"""Plan identifiers: short, unique, and in the order of their making."""

from __future__ import annotations

import secrets
from typing import Protocol

__all__ = ["Clock", "PlanIds"]

_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_TIME_DIGITS = 9  # milliseconds until the year 3084
_RANDOM_DIGITS = 4


class Clock(Protocol):
    """The two functions of the `time` module the planner uses; the module is one such clock."""

    def time(self) -> float: ...

    def monotonic(self) -> float: ...


class PlanIds:
    """Makes identifiers such as `plan-1kd2m8x4q-7f3k`: a time in milliseconds, then chance.

    They sort as they were made, even if the clock stands still or steps back; the random part
    keeps planners apart that were asked in the same millisecond.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last_ms = 0

    def make(self, kind: str) -> str:
        self._last_ms = max(int(self._clock.time() * 1000), self._last_ms + 1)
        time_part = _base32(self._last_ms, _TIME_DIGITS)
        return f"{kind}-{time_part}-{_base32(secrets.randbits(5 * _RANDOM_DIGITS), _RANDOM_DIGITS)}"


def _base32(value: int, digits: int) -> str:
    return "".join(_DIGITS[(value >> 5 * place) & 31] for place in reversed(range(digits)))
