"""How many routes go from each rank to each replica: even over an expert's replicas, near first.

Every rank holds its own tokens. All compute the same flow from the same counts, so none asks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.placement import Placement

__all__ = ["route_flow"]


def route_flow(counts: NDArray[np.intp], placement: Placement) -> NDArray[np.intp]:
    """Routes from each rank to each replica: `counts` [ranks, experts] to [ranks, replicas].

    Each replica of an expert gets the same number of its routes, give or take one (B.1). Ours: a
    rank's own routes stay on it while its own replica has room; the others fill what is left in
    order. Raises ValueError if an expert has routes and no replica.
    """
    ranks, experts = counts.shape
    totals = counts.sum(axis=0)
    replicas = placement.replicas(experts)
    if np.any((totals > 0) & (replicas == 0)):
        lost = np.flatnonzero((totals > 0) & (replicas == 0)).tolist()
        raise ValueError(f"experts {lost} have routes and no replica; place one of each first")
    of = placement.expert
    ordinal = np.arange(len(of)) - (np.cumsum(replicas) - replicas)[of]  # among its expert's
    shares = totals[of] * (ordinal + 1) // replicas[of] - totals[of] * ordinal // replicas[of]
    flow = np.zeros((ranks, len(of)), np.intp)
    left = counts.copy()
    for index, (expert, rank) in enumerate(zip(of.tolist(), placement.gpu.tolist(), strict=True)):
        near = min(left[rank, expert], shares[index])
        flow[rank, index] = near
        left[rank, expert] -= near
        shares[index] -= near
    # What is left, laid end to end expert by expert: from ranks it is `left`, to replicas `shares`.
    # Both sides are as long for each expert, so where two stretches overlap, routes flow.
    from_ends = np.cumsum(left.T.ravel())  # expert-major, then rank
    to_ends = np.cumsum(shares)
    ends = np.union1d(from_ends, to_ends)
    sizes = np.diff(ends, prepend=0)
    ends, sizes = ends[sizes > 0], sizes[sizes > 0]
    source = np.searchsorted(from_ends, ends) % ranks
    np.add.at(flow, (source, np.searchsorted(to_ends, ends)), sizes)
    return flow
