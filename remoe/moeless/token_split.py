"""Each expert's tokens, divided evenly over its replicas: the router's choices are kept (B.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.placement import Placement

__all__ = ["assign_routes", "even_split"]


def even_split(tokens: int, replicas: int) -> list[int]:
    """How many of an expert's tokens each replica gets: whole ones, at most one apart."""
    return [tokens * (i + 1) // replicas - tokens * i // replicas for i in range(replicas)]


def assign_routes(experts: NDArray[np.intp], placement: Placement) -> NDArray[np.intp]:
    """The replica that computes each route: the chosen experts, [routes], to indices [routes].

    An expert's routes go to its replicas in blocks, in their order. Raises ValueError for a route
    to an expert without a replica.
    """
    most = 1 + max(int(experts.max(initial=-1)), int(placement.expert.max(initial=-1)))
    routes = np.bincount(experts, minlength=most)
    counts = placement.replicas(most)
    if np.any((routes > 0) & (counts == 0)):
        lost = np.flatnonzero((routes > 0) & (counts == 0)).tolist()
        raise ValueError(f"experts {lost} have routes and no replica; place one of each first")
    order = np.argsort(experts, kind="stable")
    chosen = experts[order]
    rank = np.arange(len(experts)) - (np.cumsum(routes) - routes)[chosen]
    # Block i of even_split starts at routes * i // counts; this is the i that `rank` lies in.
    block = ((rank + 1) * counts[chosen] - 1) // np.maximum(routes[chosen], 1)
    assigned = np.empty(len(experts), np.intp)
    assigned[order] = (np.cumsum(counts) - counts)[chosen] + block
    return assigned
