"""Which partition the main function runs, or will load when it starts.

A main function that starts has been woken, in general by a request that was planned moments ago:
it then loads what that request's plan says. Otherwise it loads the epoch plan.

See papers.md A.6.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from planner.identifiers import Clock
from remoe.plan import Deployment, Plan

__all__ = ["EPOCH", "REQUEST", "Deployments"]

REQUEST = "request"
EPOCH = "epoch"
_REMEMBERED_PLANS = 256


@dataclass(frozen=True, slots=True)
class _Asked:
    at_s: float
    deployment: Deployment


class Deployments:
    """The claimed deployment, and the recent plans a claim may take.

    A main function that dies without releasing leaves its partition in force: plans keep to it,
    and its successor loads it again. Only a release lets a new prompt decide.
    """

    def __init__(self, *, window_s: float, clock: Clock) -> None:
        self._window_s = window_s
        self._clock = clock
        self._unclaimed: deque[_Asked] = deque(maxlen=_REMEMBERED_PLANS)
        self.current: Deployment | None = None

    def planned(self, plan: Plan) -> None:
        """Note that a request was planned, and may be about to wake the main function."""
        deployment = Deployment(
            plan_id=plan.plan_id,
            model_digest=plan.model_digest,
            partition=plan.partition,
            main_memory_gb=plan.main_memory_gb,
            origin=REQUEST,
            profile=plan.profile,
        )
        self._unclaimed.append(_Asked(self._clock.monotonic(), deployment))

    def claim(self, epoch: Callable[[], Deployment]) -> Deployment:
        """Take the most recent unclaimed plan of the window, else make the epoch's."""
        oldest_s = self._clock.monotonic() - self._window_s
        while self._unclaimed and self._unclaimed[0].at_s < oldest_s:
            self._unclaimed.popleft()
        self.current = self._unclaimed.pop().deployment if self._unclaimed else epoch()
        return self.current

    def replace(self, deployment: Deployment, instead_of: str) -> None:
        """Note that the main function now runs `deployment`, if `instead_of` is what it ran."""
        if self.current is not None and self.current.plan_id == instead_of:
            self.current = deployment

    def release(self, plan_id: str | None = None) -> bool:
        """Forget the deployment, if it is the one named or none is; says whether one was."""
        if self.current is None or plan_id not in {None, self.current.plan_id}:
            return False
        self.current = None
        return True
