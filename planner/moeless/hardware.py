"""What one MoE layer costs on a machine: the constants of MoEless' formulas (B.2), measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.placement import Placement

__all__ = ["ExpertMachine", "LayerTime", "fit_line"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMachine:
    """`row_s` is the paper's alpha, `route_s` its beta: seconds for one more row, to compute it and
    to move it one way.

    `start_s` is what an expert takes before its first row, reading its weights; which the
    paper's formula leaves out. `misc_s` and `misc_bytes` are T_misc and M_misc, of one layer.
    """

    row_s: float
    route_s: float
    expert_bytes: float
    start_s: float = 0.0
    misc_s: float = 0.0
    misc_bytes: float = 0.0
    attach_bytes_per_s: float = float("inf")

    @property
    def attach_s(self) -> float:
        """How long a cold replica's weights take to arrive."""
        return self.expert_bytes / self.attach_bytes_per_s

    def layer_time(
        self, placement: Placement, loads: NDArray[np.float64], *, gpus: int
    ) -> LayerTime:
        """One layer's forward without T_misc; `loads` are the true ones, [experts]."""
        each = placement.replica_loads(loads)  # [replicas]
        on_gpu = np.bincount(placement.gpu, each, gpus)
        moving_s = 2 * self.route_s * float(on_gpu.max())  # dispatch and combine
        starts = np.bincount(placement.gpu, each > 0, gpus)
        serial_s = float((self.start_s * starts + self.row_s * on_gpu).max())
        return LayerTime(self.row_s * float(each.max(initial=0)) + moving_s, serial_s + moving_s)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """`paper_s` is B.2's max T_r + 2 max T_g, as if all replicas of a GPU computed side by side.

    `serial_s` (ours) lets a GPU's replicas take turns, each with its start.
    """

    paper_s: float
    serial_s: float


def fit_line(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[float, float]:
    """Start and slope, neither negative, of least relative error: seconds ≈ start + slope · rows."""
    weight = 1 / seconds
    terms = np.stack([weight, rows * weight], axis=1)
    start, slope = np.linalg.lstsq(terms, np.ones(len(rows)))[0]
    if start < 0:
        return 0.0, float((rows * weight).sum() / ((rows * weight) ** 2).sum())
    if slope < 0:
        return float(weight.sum() / (weight**2).sum()), 0.0
    return float(start), float(slope)
