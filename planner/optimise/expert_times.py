"""How long an expert takes for n rows on so many vCPUs: τ^c of the paper (A.2), from a profile.

Times are linear in n between measured row counts, so a layer's total over all its experts is one
matrix product: count how the experts' rows spread over the knots, multiply by the knots' seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remoe.hardware import AllocationCurve

__all__ = ["ExpertTimes"]


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """`curves[j]` gives the seconds of `rows[j]` rows by vCPUs; no rows take no time.

    Beyond the last knot time grows on as between the last two.
    """

    rows: NDArray[np.float64]  # [knots], ascending, above 0
    curves: tuple[AllocationCurve, ...]

    @classmethod
    def linear(cls, s_per_row_at_one_vcpu: float) -> ExpertTimes:
        """Proportional to rows and to 1 / vCPUs, as in the paper's idealised examples."""
        return cls(np.array([1.0]), (AllocationCurve.inverse(s_per_row_at_one_vcpu),))

    def at(self, vcpus: NDArray[np.float64] | Sequence[float]) -> NDArray[np.float64]:
        """Seconds of each knot, [knots, specs]."""
        allocation = np.asarray(vcpus, np.float64)
        return np.stack([curve.seconds(allocation) for curve in self.curves])

    def basis(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return weights [..., knots] such that `basis(rows) @ at(vcpus)` are the seconds."""
        result = np.zeros((*rows.shape, len(self.rows)))
        if len(self.rows) == 1:
            result[..., 0] = rows / self.rows[0]
            return result
        # Below the first knot from (0, 0); then between neighbours, the last interval open-ended.
        below = rows <= self.rows[0]
        right = np.searchsorted(self.rows, rows).clip(1, len(self.rows) - 1)
        span = self.rows[right] - self.rows[right - 1]
        share = (rows - self.rows[right - 1]) / span
        first, second = 1 - share, share
        np.put_along_axis(
            result,
            (right - 1)[..., None],
            np.where(below, rows / self.rows[0], first)[..., None],
            -1,
        )
        np.put_along_axis(result, right[..., None], np.where(below, 0, second)[..., None], -1)
        return result

    def seconds(self, rows: NDArray[np.float64], vcpus: float) -> NDArray[np.float64]:
        """Seconds for each entry of `rows` on one allocation."""
        result: NDArray[np.float64] = self.basis(rows) @ self.at([vcpus])[:, 0]
        return result
