"""When to try again after a replica failed, and when to stop letting callers wait."""

from __future__ import annotations

from collections.abc import Callable

from knative.local.options import RuntimeOptions

__all__ = ["Backoff"]


class Backoff:
    """Counts failures in a row. One that comes first after a replica had worked costs no wait."""

    def __init__(self, options: RuntimeOptions, clock: Callable[[], float]) -> None:
        self._options = options
        self._clock = clock
        self._retry_at = 0.0
        self.failures = 0
        self.refusing = False
        self.reason = ""

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._retry_at - self._clock())

    @property
    def waiting(self) -> bool:
        return self.remaining_s > 0

    def worked(self) -> None:
        """A replica became ready: nobody is refused any more."""
        self.refusing = False

    def give_up(self) -> None:
        """Refuse callers from now on, without more tries first."""
        self.refusing = True

    def failed(self, reason: str, *, ready_at: float | None) -> None:
        """A replica failed; `ready_at` is when it had become ready, if it had."""
        now = self._clock()
        self.reason = reason
        if ready_at is not None and now - ready_at >= self._options.stable_after_s:
            self.failures = 0
        self.failures += 1
        if self.failures >= self._options.failures_until_refusal:
            self.refusing = True
        waits = self.failures - (ready_at is not None)
        delay_s = 0.0
        if waits:
            delay_s = self._options.backoff_first_s * 2.0 ** min(waits - 1, 20)
        self._retry_at = now + min(delay_s, self._options.backoff_most_s)
