"""Knative's KPA decision, and its scale to zero, as a pure class with an injected clock.

Follows `pkg/autoscaler/scaling/autoscaler.go` and `pkg/reconciler/autoscaling/kpa/scaler.go` of
https://github.com/knative/serving: every tick, the mean concurrency over a stable and a panic
window is divided by the target, limited in speed, held up by panic and by the scale-down delay,
and bounded; zero needs in addition a whole stable window of silence while active, and then the
grace or the retention period, whichever is longer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from knative.policy import ScalingPolicy

__all__ = ["Autoscaler", "Decision"]


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be, and the means it rests on."""

    desired: int
    stable: float
    panic: float
    panicking: bool


class Autoscaler:
    """One function's scaling state. Call `record` each sample and `decide` each tick.

    `grace_s` is Knative's scale-to-zero-grace-period: the longest it waits for the activator to be
    in the request path before it removes the last replica.
    """

    def __init__(
        self,
        policy: ScalingPolicy,
        *,
        container_concurrency: int,
        clock: Callable[[], float],
        grace_s: float = 30.0,
        max_scale_up_rate: float = 1000.0,
        max_scale_down_rate: float = 2.0,
    ) -> None:
        self._policy = policy
        self._target = policy.target_concurrency(container_concurrency)
        self._clock = clock
        self._grace_s = grace_s
        self._max_scale_up_rate = max_scale_up_rate
        self._max_scale_down_rate = max_scale_down_rate
        self._samples: deque[tuple[float, float]] = deque()
        self._delayed: deque[tuple[float, int]] = deque()
        self._panic_since: float | None = None
        self._panic_replicas = 0
        self._initialised = False
        self._active_since: float | None = None
        self._inactive_since: float | None = None
        self._asked = 0
        self._asked_until = 0.0
        self._may_rest = False

    def record(self, concurrency: float) -> None:
        """Add a sample: the mean requests in flight, over all replicas, since the last one."""
        self._samples.append((self._clock(), concurrency))
        if concurrency > 0:
            self._may_rest = False

    def ask(self, replicas: int, for_s: float) -> None:
        """Keep at least so many, within the policy's bounds, for `for_s`; what a caller foresees.

        With 0 that wish ends, and what was measured is forgotten: the function may go to zero at
        once rather than after its window. A call changes that. Knative knows neither; Remoe's
        functions behave there as if nobody had asked.
        """
        self._asked, self._asked_until = replicas, self._clock() + for_s
        if not replicas:
            self._samples.clear()
            self._delayed.clear()
            self._panic_since, self._panic_replicas = None, 0
            self._may_rest = True

    def activate(self) -> int:
        """Note that a request waits at zero; returns how many replicas to start for it."""
        self.record(1.0)
        self._inactive_since = None
        return max(1, self._bounded(self._policy.activation_scale))

    def decide(self, *, ready: int, starting: int) -> Decision:
        """The number of replicas there should be now."""
        now = self._clock()
        self._forget(now)
        if ready and self._active_since is None:
            self._active_since = now
        stable = self._mean(now - self._policy.window_s)
        panic = self._mean(now - self._policy.panic_window_s)
        wanted = self._wanted(now, stable, panic, ready)
        if now < self._asked_until:
            wanted = max(wanted, self._asked)
        desired = self._after_initial(self._bounded(wanted), ready)
        if desired == 0:
            desired = self._towards_zero(now, ready, starting)
        else:
            self._inactive_since = None
        return Decision(desired, stable, panic, self._panic_since is not None)

    def _wanted(self, now: float, stable: float, panic: float, ready: int) -> int:
        observed = max(1, ready)
        most = math.ceil(self._max_scale_up_rate * observed)
        least = math.floor(observed / self._max_scale_down_rate)
        for_stable = math.ceil(stable / self._target)
        for_panic = math.ceil(panic / self._target)
        over = for_panic / observed >= self._policy.panic_threshold_percentage / 100
        wanted_stable = min(max(for_stable, least), most)
        wanted_panic = min(max(for_panic, least), most)
        if for_stable > 0:
            wanted_stable = max(wanted_stable, self._policy.activation_scale)
        if for_panic > 0:
            wanted_panic = max(wanted_panic, self._policy.activation_scale)
        if over:
            self._panic_since = now
        elif self._panic_since is not None and now - self._panic_since > self._policy.window_s:
            self._panic_since = None
            self._panic_replicas = 0
        wanted = wanted_stable
        if self._panic_since is not None:
            # Panic only ever adds replicas; the surge has to reach the stable mean before it ends.
            self._panic_replicas = max(self._panic_replicas, wanted_stable, wanted_panic)
            wanted = self._panic_replicas
        return self._delay(now, wanted)

    def _delay(self, now: float, wanted: int) -> int:
        if not self._policy.scale_down_delay_s:
            return wanted
        self._delayed.append((now, wanted))
        while self._delayed[0][0] < now - self._policy.scale_down_delay_s:
            self._delayed.popleft()
        return max(count for _, count in self._delayed)

    def _bounded(self, count: int) -> int:
        if self._policy.max_scale:
            count = min(count, self._policy.max_scale)
        return max(count, self._policy.min_scale)

    def _after_initial(self, count: int, ready: int) -> int:
        initial = self._bounded(self._policy.initial_scale)
        if self._policy.initial_scale == 0:
            initial = self._policy.min_scale
        if ready >= initial:
            self._initialised = True
        return count if self._initialised else max(count, initial)

    def _towards_zero(self, now: float, ready: int, starting: int) -> int:
        if not ready:
            self._active_since = None
            # A start is never cut short for want of traffic; its progress deadline ends it.
            return starting
        active_since = now if self._active_since is None else self._active_since
        if self._may_rest:
            self._active_since = self._inactive_since = None
            return 0
        if self._inactive_since is None:
            if now - active_since < self._policy.window_s:
                return 1
            self._inactive_since = now
        if now - self._inactive_since < max(self._grace_s, self._policy.retention_s):
            return 1
        self._active_since = None
        self._inactive_since = None
        return 0

    def _forget(self, now: float) -> None:
        while self._samples and self._samples[0][0] <= now - self._policy.window_s:
            self._samples.popleft()

    def _mean(self, since: float) -> float:
        values = [value for at, value in self._samples if at > since]
        return sum(values) / len(values) if values else 0.0
