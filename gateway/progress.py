"""What a waiting client is told: what is going on, since when, and how long it takes as a rule."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from gateway.timings import Timings

__all__ = ["Phase", "Progress"]

# In this order: a plan is made; the main function starts, if it is at zero, and takes the request;
# it reads the prompt when its turn has come; it answers.
Phase = Literal["planning", "starting", "reading", "answering"]
_ORDER: tuple[Phase, ...] = ("planning", "starting", "reading", "answering")


class Progress:
    """The phase of one request: that of its foremost choice."""

    def __init__(self, timings: Timings, clock: Callable[[], float] = time.monotonic) -> None:
        self._timings = timings
        self._clock = clock
        self.phase: Phase = "planning"
        self._since = clock()

    def enter(self, phase: Phase) -> None:
        """Go on to a phase; a choice that lags behind changes nothing."""
        if _ORDER.index(phase) > _ORDER.index(self.phase):
            self.phase = phase
            self._since = self._clock()

    def comment(self) -> str:
        """The text of a heartbeat, as in `remoe phase=starting waited_s=2 expected_s=7.9`.

        `expected_s` is the median of what this phase took lately, left out until one was measured.
        """
        expected_s = {
            "starting": self._timings.start_s,
            "reading": self._timings.first_token_s,
        }.get(self.phase)
        said = f"remoe phase={self.phase} waited_s={self._clock() - self._since:.1f}"
        return said if expected_s is None else f"{said} expected_s={expected_s:.1f}"
