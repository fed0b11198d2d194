"""What MoEless is compared with besides EPLB: plain expert parallelism, and the lossy Oracle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.placement import Placement

__all__ = ["expert_parallel", "moved_by_oracle", "oracle_loads"]


def expert_parallel(experts: int, gpus: int) -> Placement:
    """Megatron-LM's expert parallelism: one replica of each expert, in blocks over the GPUs."""
    index = np.arange(experts)
    return Placement(index, index * min(gpus, experts) // experts, gpus)


def oracle_loads(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loads as if the router were disregarded and tokens spread evenly: the bound, and lossy."""
    return np.full(len(loads), float(loads.mean()))


def moved_by_oracle(loads: NDArray[np.float64]) -> float:
    """The share of routes that the Oracle sends to another expert than the router's."""
    total = float(loads.sum())
    return float(np.maximum(loads - loads.mean(), 0).sum()) / total if total else 0.0
