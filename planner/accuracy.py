"""How good the predictions were: plans kept until their request is done, then compared.

See papers.md A.14.
"""

from __future__ import annotations

from collections import OrderedDict

from planner.divergence import profile_divergence
from planner.phases import PhaseProfiles
from remoe.experts import ActivationProfile

__all__ = ["Accuracy", "RunningMean"]

_KEPT_PLANS = 1024


class RunningMean:
    """A mean and how many values it has; None before the first."""

    def __init__(self) -> None:
        self._mean = 0.0
        self.count = 0

    @property
    def value(self) -> float | None:
        return self._mean if self.count else None

    def add(self, value: float) -> None:
        self.count += 1
        self._mean += (value - self._mean) / self.count


class Accuracy:
    """Mean Jensen-Shannon divergence between predicted and observed profiles, for each phase."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, PhaseProfiles] = OrderedDict()
        self.prefill = RunningMean()
        self.decode = RunningMean()

    def predicted(self, plan_id: str, profiles: PhaseProfiles) -> None:
        self._open[plan_id] = profiles
        if len(self._open) > _KEPT_PLANS:
            self._open.popitem(last=False)

    def prediction(self, plan_id: str) -> PhaseProfiles | None:
        """What was predicted for a plan that has not been compared yet."""
        return self._open.get(plan_id)

    def observed(
        self, plan_id: str, prefill: ActivationProfile, decode: ActivationProfile | None
    ) -> tuple[float | None, float | None]:
        """Return the divergences of prefill and decode from the plan's prediction.

        None for a plan that is unknown or was compared, and for a phase that did not happen.
        """
        predicted = self._open.pop(plan_id, None)
        if predicted is None:
            return None, None
        of_prefill = profile_divergence(predicted.prefill, prefill)
        self.prefill.add(of_prefill)
        if decode is None:
            return of_prefill, None
        of_decode = profile_divergence(predicted.decode, decode)
        self.decode.add(of_decode)
        return of_prefill, of_decode
