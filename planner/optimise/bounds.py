"""How many tokens cold experts can get at worst: Theorem 1 and Corollary 1 (A.8).

Hoeffding's inequality gives P(excess >= t) <= exp(-2 t² / n), so the 95 % bound needs
t = √(3n/2). The paper prints √(3n)/2, which is only a 77.7 % bound; it is kept behind a flag.
n counts token-expert assignments, N x topk; counted in tokens it would be no bound.
"""

from __future__ import annotations

import math

__all__ = ["confidence", "excess", "worst_load"]


def excess(assignments: float, *, printed: bool = False) -> float:
    """The t of Theorem 1."""
    return math.sqrt(3 * assignments) / 2 if printed else math.sqrt(1.5 * assignments)


def confidence(assignments: float, t: float) -> float:
    """Hoeffding's lower bound on the chance that the excess stays below t."""
    return 1 - math.exp(-2 * t * t / assignments)


def worst_load(assignments: float, ratio: float, *, printed: bool = False) -> float:
    """Corollary 1: what the coldest `ratio` of a layer's experts gets at most, at 95 %.

    0 for no experts, never more than all there is.
    """
    if ratio <= 0 or assignments <= 0:
        return 0.0
    return min(assignments, excess(assignments, printed=printed) + ratio * assignments)
