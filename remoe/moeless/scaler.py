"""The Expert Scaler: replicas for the most loaded experts, until loads are alike (Algorithm 1).

All replicas of an expert have the same load, so the heap has one entry an expert. Their sum is
constant and the sum of their squares is Σ W²/R, so each step updates the variance in O(1).
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

__all__ = ["CV_THRESHOLD", "added_within", "load_cv", "scale"]

CV_THRESHOLD = 0.2  # V, the paper's default
_ROUNDING = 1e-9  # equal loads count as equal, whatever order they were added in


def load_cv(loads: NDArray[np.float64], replicas: NDArray[np.intp]) -> float:
    """Standard deviation over mean of the replicas' loads: each of expert e's is W_e / R_e.

    Population deviation (ours: the paper does not say which). 0 without any load. Experts without
    a replica must have no load.
    """
    count = int(replicas.sum())
    largest = float(loads.max(initial=0.0))
    if largest == 0:
        return 0.0
    relative = loads / largest  # the square of a tiny load would be 0
    total = float(relative.sum())
    squares = float((relative**2 / np.maximum(replicas, 1)).sum())
    return float(np.sqrt(max(0.0, count * squares / total**2 - 1)))


def added_within(cap_bytes: float, replica_bytes: float) -> int:
    """How many replicas fit a layer's memory cap M_cap, beyond the one that each expert has."""
    return int(cap_bytes // replica_bytes)


def scale(
    loads: NDArray[np.float64],
    *,
    most_added: int,
    cv_threshold: float | None = CV_THRESHOLD,
    scale_to_zero: bool = False,
    split_above: float = 0.0,
) -> NDArray[np.intp]:
    """Replicas R of each expert for loads W, both [experts]: Algorithm 1.

    While the replicas' CV is above `cv_threshold`, the most loaded replica's expert gets one more,
    at most `most_added` in all (M_cap / M_e). Among equals the lower index goes first. A larger
    threshold never gives an expert more; with None all `most_added` are given, as EPLB does.

    `scale_to_zero` (ours) gives an expert without load no replica and leaves it out of the CV;
    the paper's experts always have one. `split_above` (ours) adds a replica only while the largest
    load a replica is above it: starting an expert takes as long as some rows do. Raises ValueError on a load that is negative or no number.
    """
    weights = [float(load) for load in loads]
    if not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError("loads must be numbers from 0 up; count the tokens routed to each expert")
    replicas = [int(weight > 0) for weight in weights] if scale_to_zero else [1] * len(weights)
    total = sum(weights)
    if total == 0:
        return np.array(replicas, np.intp)
    count = sum(replicas)
    squares = sum(weight * weight for weight in weights)
    # CV² = count·squares / total² - 1
    enough = -1.0 if cv_threshold is None else (cv_threshold**2 + 1) * total**2 * (1 + _ROUNDING)
    heap = [(-weight, expert) for expert, weight in enumerate(weights)]
    heapq.heapify(heap)
    for _ in range(most_added):
        if count * squares <= enough or -heap[0][0] <= split_above:
            break
        expert = heap[0][1]
        weight, more = weights[expert], replicas[expert] + 1
        squares -= weight * weight / (more * (more - 1))  # W²/R - W²/(R+1)
        replicas[expert] = more
        count += 1
        heapq.heapreplace(heap, (-weight / more, expert))
    return np.array(replicas, np.intp)
