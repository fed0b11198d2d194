"""Predicted and actual routes of all compared requests together, for heat maps of a load.

See papers.md A.14.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.phases import PhaseProfiles
from remoe.activation_totals import ActivationTotals

__all__ = ["RouteTotals"]


class RouteTotals:
    """Sums since the planner started; whoever reads them twice has what came in between."""

    def __init__(self, layers: int, experts: int) -> None:
        self._requests = 0
        self._predicted = np.zeros((layers, experts))
        self._actual = np.zeros((layers, experts))

    def add(
        self, predicted: PhaseProfiles, prefill: NDArray[np.int64], decode: NDArray[np.int64]
    ) -> None:
        """Take one request's prediction and its route counts, [layers, experts] of each phase."""
        self._requests += 1
        self._actual += prefill + decode
        for profile, counts in ((predicted.prefill, prefill), (predicted.decode, decode)):
            self._predicted += profile.shares * counts.sum(axis=1, keepdims=True)

    def read(self) -> ActivationTotals:
        return ActivationTotals(
            requests=self._requests,
            predicted=np.round(self._predicted, 3).tolist(),
            actual=self._actual.tolist(),
        )
