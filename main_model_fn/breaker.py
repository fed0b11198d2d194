"""Stop calling an expert function that keeps failing, and try again a little later."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    """Open after a failure for `cooldown_s`, doubled by each further one up to `max_cooldown_s`.

    When the time is over one call is let through: its success closes the breaker.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        cooldown_s: float = 0.5,
        max_cooldown_s: float = 30.0,
    ) -> None:
        self._clock = clock
        self._first_cooldown_s = cooldown_s
        self._max_cooldown_s = max_cooldown_s
        self._cooldown_s = cooldown_s
        self._open_until: float | None = None

    @property
    def allows(self) -> bool:
        return self._open_until is None or self._clock() >= self._open_until

    def succeeded(self) -> None:
        self._open_until = None
        self._cooldown_s = self._first_cooldown_s

    def failed(self) -> None:
        """Note a failure; those of calls that left together count as one."""
        now = self._clock()
        if self._open_until is not None and now < self._open_until:
            return
        self._open_until = now + self._cooldown_s
        self._cooldown_s = min(2 * self._cooldown_s, self._max_cooldown_s)
