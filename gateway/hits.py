"""Local hits: how much of the routing stays in the main function, as planned and as it came."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from remoe.experts import Partition
from remoe.generation import GenerationStats
from remoe.plan import Plan

__all__ = ["activation_error", "count_hits", "predicted_hit_rate"]


def predicted_hit_rate(plan: Plan) -> float | None:
    """The share of routes that the plan's profile sends to experts of its own partition."""
    profile = np.asarray(plan.profile)  # [layers, experts]
    total = profile.sum()
    return float(profile[_local(plan.partition)].sum() / total) if total > 0 else None


def count_hits(plan: Plan, stats: GenerationStats) -> tuple[int, int]:
    """Routes to local experts, and all routes, of one finished generation."""
    counts = _counts(stats)
    if counts.shape != (len(plan.partition.remote), plan.partition.experts):
        return 0, 0
    return int(counts[_local(plan.partition)].sum()), int(counts.sum())


def activation_error(plan: Plan, stats: GenerationStats) -> float | None:
    """Total variation distance between predicted and actual profiles, mean over layers, 0 to 1.

    Half the summed absolute difference of shares: the part of the routes that went elsewhere.
    """
    counts, profile = _counts(stats), np.asarray(plan.profile)
    if counts.shape != profile.shape:
        return None
    used = counts.sum(axis=1) > 0
    if not used.any():
        return None
    actual = counts[used] / counts[used].sum(axis=1, keepdims=True)
    return float(np.abs(profile[used] - actual).sum(axis=1).mean() / 2)


def _counts(stats: GenerationStats) -> NDArray[np.int64]:
    prefill = np.asarray(stats.prefill_counts, dtype=np.int64)  # [layers, experts]
    decode = np.asarray(stats.decode_counts, dtype=np.int64)  # [layers, experts]
    return np.add(prefill, decode, dtype=np.int64)


@lru_cache(maxsize=64)  # most requests in a row have plans of few partitions
def _local(partition: Partition) -> NDArray[np.bool_]:
    mask = np.ones((len(partition.remote), partition.experts), dtype=bool)
    for layer, experts in enumerate(partition.remote):
        mask[layer, list(experts)] = False
    return mask
