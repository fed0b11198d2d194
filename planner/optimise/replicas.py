"""Replicas of an expert function, and which replica gets which expert (A.12).

Longest processing time first splits a layer's experts; its largest load is at most 4/3 - 1/(3z) of
the best. Replicas only shorten prefill, so they are bought for TTFT: as printed, one sentence says
TPOT (papers.md D 7).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["grow_replicas", "lpt", "lpt_bound"]


def lpt(loads: NDArray[np.float64], replicas: int) -> NDArray[np.intp]:
    """Assign each expert to a replica: `loads` is [layers, experts], the result too.

    Largest first, each to the least loaded; among equals the lower index goes first.
    """
    layers, experts = loads.shape
    owner = np.zeros((layers, experts), np.intp)
    if replicas == 1:
        return owner
    order = np.argsort(-loads, axis=1, kind="stable")  # [layers, experts]
    totals = np.zeros((layers, replicas))
    rows = np.arange(layers)
    for place in range(experts):
        expert = order[:, place]
        least = totals.argmin(axis=1)
        owner[rows, expert] = least
        totals[rows, least] += loads[rows, expert]
    return owner


def lpt_bound(loads: NDArray[np.float64], replicas: int) -> float:
    """The deterministic core of Theorem 4: no LPT load of one layer, [experts], exceeds it."""
    if len(loads) == 0:
        return 0.0
    return float((replicas - 1) / replicas * loads.max() + loads.sum() / replicas)


def grow_replicas(
    cost_usd: NDArray[np.float64],
    prefill_s: NDArray[np.float64],
    start: NDArray[np.intp],
    budget_s: float,
) -> NDArray[np.intp]:
    """Add replicas greedily, from the fewest that the payload limit allows (A.12, steps 2 to 4).

    `cost_usd[z - 1]` and `prefill_s[z - 1]` are each layer's with z replicas, [replicas, layers]:
    layers follow each other, so both add up. ϖ is what one more saves. While the sum of seconds
    exceeds the budget, the layer of largest ϖ gets one; after that every layer whose ϖ is above 0.
    """
    most, layers = cost_usd.shape
    rows = np.arange(layers)
    replicas = start.copy()
    left_s = budget_s - float(prefill_s[replicas - 1, rows].sum())
    while True:
        after = np.minimum(replicas, most - 1)  # index of one more, if there can be one
        can = replicas < most
        saving = np.where(can, cost_usd[replicas - 1, rows] - cost_usd[after, rows], -np.inf)
        faster_s = prefill_s[replicas - 1, rows] - prefill_s[after, rows]
        if left_s < 0:  # one that does not help TTFT is not bought for it
            saving = np.where((faster_s > 0) | (saving > 0), saving, -np.inf)
        best = int(saving.argmax())
        if saving[best] == -np.inf or (saving[best] <= 0 and left_s >= 0):
            return replicas
        replicas[best] += 1
        left_s += float(faster_s[best])
