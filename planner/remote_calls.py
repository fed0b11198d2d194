"""How likely one token needs a remote expert of a layer, from the layer's shares alone.

A token uses k distinct experts, so the k draws are without replacement: the model is successive
sampling with the shares as weights, as if experts raced with exponential times of these rates and
the first k were used. The token stays local if k local experts arrive before any remote one.
Shares do not say which experts go together, so this is an approximation.

See papers.md A.3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["call_chance_by_count", "remote_call_chance"]

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)
# Times at which arrivals are followed when one pass serves every partition of a layer: an expert
# of share s arrives around 1 / s. Zero and infinity are the ends.
_TIMES = np.concatenate([[0.0], np.geomspace(0.1, 1e3, 30)])
# The most used experts are followed one by one. Of the many others each is so unlikely that the
# number of a block of them is a Poisson variable: within 0.005 of the exact chance at 256 experts.
_ONE_BY_ONE = 48
_TOGETHER = 16


def remote_call_chance(
    shares: NDArray[np.floating], remote: NDArray[np.bool_], top_k: int
) -> NDArray[np.float64]:
    """Return for each layer the chance that at least one of a token's experts is remote.

    `shares` and `remote` are [layers, experts]. Never above k times the remote share, which is
    the expected number of remote experts a token uses.
    """
    shares = shares.astype(np.float64)
    mass = np.where(remote, shares, 0).sum(axis=1).clip(0, 1)  # [layers]
    bound: NDArray[np.float64] = np.minimum(1, top_k * mass)
    racing = mass > 0
    if not racing.any():
        return bound
    # With u uniform, the first remote expert arrives at t = -ln(u) / mass, and a local one of
    # share s by then with the chance 1 - u^(s / mass).
    rates = np.where(remote, 0, shares)[racing] / mass[racing, None]  # [racing, experts]
    most_local = max(1, int((~remote[racing]).sum(axis=1).max()))  # a remote one never arrives
    rates = -np.sort(-rates, axis=1)[:, :most_local].T  # [most local experts, racing]
    u = (_POINTS + 1) / 2  # [points]
    arrivals = _Arrivals(u ** rates[..., None], top_k)
    arrivals.follow(most_local)
    fewer = arrivals.fewer_than_k.reshape(len(rates[0]), -1) @ (_WEIGHTS / 2)
    result = bound.copy()
    result[racing] = np.minimum(bound[racing], fewer)
    return result


def call_chance_by_count(
    shares: NDArray[np.floating], top_k: int, counts: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Return the same chance, [layers, counts], if the last `counts[i]` experts of each row are
    remote: one pass over the experts for all partitions.

    `shares` is [layers, experts], with the experts in the order in which they stay local.
    """
    ordered = shares.astype(np.float64)
    layers, experts = ordered.shape
    mass = np.zeros((layers, experts + 1))
    mass[:, 1:] = ordered[:, ::-1].cumsum(axis=1)  # of the last r, by r
    mass = mass[:, counts].clip(0, 1)  # [layers, counts]
    arrivals = _Arrivals(np.exp(-ordered.T[..., None] * _TIMES), top_k)
    still = np.empty((len(counts), layers * len(_TIMES)))  # fewer than k local experts by then
    places = {experts - int(count): place for place, count in enumerate(counts)}
    for local in sorted(places):
        arrivals.follow(local)
        still[places[local]] = arrivals.fewer_than_k
    still = still.reshape(len(counts), layers, -1).swapaxes(0, 1)  # [layers, counts, times]
    # The first remote expert arrives between two times with a chance known exactly.
    until = 1 - np.exp(-mass[..., None] * _TIMES)  # [layers, counts, times]
    between = np.diff(until, axis=-1) * (still[..., 1:] + still[..., :-1]) / 2
    chance = between.sum(axis=-1) + (1 - until[..., -1]) * still[..., -1]
    result: NDArray[np.float64] = np.minimum(np.minimum(1, top_k * mass), chance)
    return result


class _Arrivals:
    """How many experts have arrived, of those followed so far: the chance of each number below k.

    `away` is the chance of each expert not to have arrived, [experts, ...], the most used first;
    whatever the other axes are, they are one here. Single precision: the time goes into moving
    these through the caches.
    """

    def __init__(self, away: NDArray[np.float64], top_k: int) -> None:
        self._away = away.astype(np.float32).reshape(len(away), -1)
        self._arrived = 1 - self._away
        self._fewer = np.zeros((top_k, self._away.shape[1]), np.float32)
        self._fewer[0] = 1
        self._moved = np.empty((top_k - 1, self._away.shape[1]), np.float32)
        self._followed = 0

    @property
    def fewer_than_k(self) -> NDArray[np.float32]:
        total: NDArray[np.float32] = self._fewer.sum(axis=0)
        return total

    def follow(self, until: int) -> None:
        """Follow the first `until` experts, which are no fewer than before."""
        for expert in range(self._followed, min(until, _ONE_BY_ONE)):
            np.multiply(self._fewer[:-1], self._arrived[expert], out=self._moved)
            self._fewer *= self._away[expert]
            self._fewer[1:] += self._moved
        for start in range(max(self._followed, _ONE_BY_ONE), until, _TOGETHER):
            self._follow_block(self._arrived[start : min(start + _TOGETHER, until)].sum(axis=0))
        self._followed = until

    def _follow_block(self, expected: NDArray[np.float32]) -> None:
        """Many unlikely experts, `expected` of which have arrived by each time."""
        chance = np.exp(-expected)  # of none
        result = self._fewer * chance
        for arrivals in range(1, len(self._fewer)):
            chance = chance * expected / arrivals
            result[arrivals:] += self._fewer[:-arrivals] * chance
        self._fewer = result
