"""Splitting prompts around medoids: the paper's k-medoids (A.7.2), and PAM, which it replaces.

Both group points by the distance to a medoid, a point of the group's own. With unit vectors the
squared Euclidean distance is 2 (1 - SCS), so that one function serves the paper's distance and
VarED's, which is Euclidean between activation profiles.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Clustering", "k_medoids", "pam"]

_ITERATIONS = 10
_PAM_BLOCK = 512  # columns of the distance matrix compared at a time


class Clustering(Protocol):
    def __call__(
        self, points: NDArray[np.float32], forks: int, chance: np.random.Generator
    ) -> NDArray[np.intp]:
        """Return the rows of at most `forks` medoids of [points, dimension]."""
        ...


def k_medoids(
    points: NDArray[np.float32], forks: int, chance: np.random.Generator
) -> NDArray[np.intp]:
    """Roulette-wheel seeding, then each sub-cluster picks its own medoid until none moves.

    The point of least summed squared distance to its cluster is the one nearest the cluster's mean:
    Σ_y |x - y|² = m |x|² - 2 x · Σ y + const. So a round takes one pass, not all pairs.
    """
    squares = np.einsum("ij,ij->i", points, points)  # [points]
    medoids = _roulette(points, squares, forks, chance)
    for _ in range(_ITERATIONS):
        nearest = assign(points, points[medoids])
        moved = medoids.copy()
        for cluster in range(len(medoids)):
            members = np.flatnonzero(nearest == cluster)
            if len(members):
                total = points[members].sum(axis=0)
                cost = len(members) * squares[members] - 2 * points[members] @ total
                moved[cluster] = members[cost.argmin()]
        if (moved == medoids).all():
            break
        medoids = moved
    return np.unique(medoids)


def assign(points: NDArray[np.float32], medoids: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return each point's nearest medoid, the first of equals: [points]."""
    score = points @ medoids.T - np.einsum("ij,ij->i", medoids, medoids) / 2
    result: NDArray[np.intp] = score.argmax(axis=1)
    return result


def _roulette(
    points: NDArray[np.float32],
    squares: NDArray[np.float32],
    forks: int,
    chance: np.random.Generator,
) -> NDArray[np.intp]:
    """Draw medoids one by one, a point by its squared SCS distance to the nearest drawn so far."""
    medoids = [int(chance.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(medoids) < forks:
        last = medoids[-1]
        nearest = np.minimum(nearest, squares + squares[last] - 2 * points @ points[last])
        slots = np.maximum(nearest, 0) ** 2
        slots[medoids] = 0
        if slots.sum() == 0:  # all the others are copies
            break
        medoids.append(int(chance.choice(len(points), p=slots / slots.sum())))
    return np.array(medoids, np.intp)


def pam(points: NDArray[np.float32], forks: int, chance: np.random.Generator) -> NDArray[np.intp]:
    """Partitioning Around Medoids (Kaufman and Rousseeuw): greedy build, then the best swap of a
    medoid and another point, as long as one lowers the summed distance.

    Compares all pairs of points for every medoid in every round: what VarPAM costs.
    """
    squares = np.einsum("ij,ij->i", points, points)
    distance = points @ points.T  # [points, points]; large, so that it is changed in place
    distance *= -2
    distance += squares[:, None]
    distance += squares
    np.maximum(distance, 0, out=distance)
    medoids = [int(distance.sum(axis=0).argmin())]
    while len(medoids) < min(forks, len(points)):
        cost, candidate = _best_addition(distance, distance[medoids].min(axis=0), medoids)
        if cost == distance[medoids].min(axis=0).sum(dtype=np.float64):
            break  # all the others are copies
        medoids.append(candidate)
    total = distance[medoids].min(axis=0).sum(dtype=np.float64)
    while len(medoids) > 1:
        best = (total, -1, -1)
        for place in range(len(medoids)):
            others = medoids[:place] + medoids[place + 1 :]
            cost, candidate = _best_addition(distance, distance[others].min(axis=0), others)
            best = min(best, (cost, place, candidate))
        # Sums of float32 in another order differ by rounding, which is no gain.
        if best[0] >= total * (1 - 1e-6):
            break
        total = best[0]
        medoids[best[1]] = best[2]
    return np.sort(np.array(medoids, np.intp))


def _best_addition(
    distance: NDArray[np.float32], nearest: NDArray[np.float32], medoids: list[int]
) -> tuple[float, int]:
    """The summed distance with the best further medoid, and that medoid."""
    costs = np.empty(len(distance))
    for start in range(0, len(distance), _PAM_BLOCK):
        block = distance[start : start + _PAM_BLOCK]  # a candidate a row: the matrix is symmetric
        costs[start : start + _PAM_BLOCK] = np.minimum(block, nearest).sum(axis=1)
    costs[medoids] = np.inf
    candidate = int(costs.argmin())
    return float(costs[candidate]), candidate
