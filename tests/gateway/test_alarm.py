"""An alarm rings after each silence that is long enough, and after no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from gateway.alarm import Alarm

LIMIT_MS = 100


class Timer(asyncio.TimerHandle):
    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due, self.callback, self.over = due, callback, False

    def cancel(self) -> None:
        self.over = True


class Timers:
    """An event loop's timers by a clock that is set; in milliseconds, so that sums are exact."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self.now + delay, callback)
        self.made.append(timer)
        return timer

    def go_on(self, to: float) -> None:
        while due := [timer for timer in self.made if not timer.over and timer.due <= to]:
            first = min(due, key=lambda timer: timer.due)
            self.now, first.over = max(self.now, first.due), True
            first.callback()
        self.now = to


@given(gaps_ms=st.lists(st.integers(1, 350), min_size=1, max_size=20))
def test_it_rings_for_silences_alone(gaps_ms: list[int]) -> None:
    timers, rings = Timers(), list[float]()
    alarm = Alarm(LIMIT_MS, lambda: rings.append(timers.now), loop=timers)
    expected: list[float] = []
    heard_at = 0
    for gap in gaps_ms:
        expected += range(heard_at + LIMIT_MS, heard_at + gap + 1, LIMIT_MS)
        heard_at += gap
        timers.go_on(heard_at)
        alarm.heard()
    assert rings == expected
    # No timer for what was heard: of three looks in a row the first and the last are a limit apart.
    assert len(timers.made) <= 2 + 2 * heard_at // LIMIT_MS
    alarm.stop()
    timers.go_on(heard_at + 10 * LIMIT_MS)
    assert rings == expected
