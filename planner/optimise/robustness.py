"""Plans that hold when calls and cold starts are slow: means for the bill, tails for the SLOs.

The paper takes single values. An invocation's time is a distribution with a heavy tail, and so is
a cold start's; a plan whose limits are checked with means breaks them about every second time they
bind. Here limits see a system slowed so far that TTFT and TPOT together hold for 95 % of requests (by the union bound each
gets 97.5 %), and the bill the mean one.

Ours, beyond papers.md A.15.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.optimise.system import System
from remoe.hardware import Spread

__all__ = ["Uncertainty"]


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """What varies from request to request.

    `prefill_tail` and `decode_tail` are the P97.5 of observed over predicted times, relative
    to their mean: what remains unexplained, wrong predictions of routes among it.
    """

    invocation: Spread
    cold_start: Spread
    prefill_tail: float = 1.0
    decode_tail: float = 1.0

    def expected(self, system: System) -> System:
        """The system that is paid for."""
        return system.with_(
            invocation_s=self.invocation.mean_s, cold_start_s=self.cold_start.mean_s
        )

    def slow(self, system: System) -> System:
        """The system that SLOs must survive."""
        return system.with_(
            invocation_s=self.invocation.p975_s,
            cold_start_s=self.cold_start.p975_s,
            prefill_factor=system.prefill_factor * self.prefill_tail,
            decode_factor=system.decode_factor * self.decode_tail,
        )
