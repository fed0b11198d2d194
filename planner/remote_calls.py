"""How likely one token needs a remote expert of a layer, from the layer's shares alone.

A token uses k distinct experts, so the k draws are without replacement: the model is successive
sampling with the shares as weights, as if experts raced with exponential times of these rates and
the first k were used. The token stays local if k local experts arrive before any remote one.
Shares do not say which experts go together, so this is an approximation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["call_chance_by_count", "remote_call_chance"]

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)
# Times at which arrivals are followed when one pass serves every partition of a layer: an expert
# of share s arrives around 1 / s. Zero and infinity are the ends.
# The most used experts are followed one by one. Of the many others each is so unlikely that the
# number of a block of them is a Poisson variable: within 0.005 of the exact chance at 256 experts.
_ONE_BY_ONE = 48
_TOGETHER = 16
_TIMES = np.concatenate([[0.0], np.geomspace(0.1, 1e3, 30)])


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
    u = (_POINTS + 1) / 2  # [points]
    arrived = 1 - u ** rates[..., None]  # [racing, experts, points]
    chance_of = np.zeros((top_k, *arrived[:, 0].shape))  # [arrivals below k, racing, points]
    chance_of[0] = 1
    for expert in range(arrived.shape[1]):
        came = arrived[:, expert]
        chance_of[1:] = chance_of[1:] * (1 - came) + chance_of[:-1] * came
        chance_of[0] *= 1 - came
    result = bound.copy()
    result[racing] = np.minimum(bound[racing], chance_of.sum(axis=0) @ (_WEIGHTS / 2))
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
    # [experts, layers x times], in single precision: the time goes into moving these through.
    away = np.exp(-ordered.T[..., None] * _TIMES).astype(np.float32).reshape(experts, -1)
    arrived = 1 - away
    fewer = np.zeros((top_k, away.shape[1]), np.float32)  # so many arrived, of those below k
    fewer[0] = 1
    moved = np.empty((top_k - 1, away.shape[1]), np.float32)
    still = np.empty((len(counts), away.shape[1]))  # fewer than k local experts by then
    places = {experts - int(count): place for place, count in enumerate(counts)}
    local = 0
    for until_local in sorted(places):
        while local < min(until_local, _ONE_BY_ONE):
            np.multiply(fewer[:-1], arrived[local], out=moved)
            fewer *= away[local]
            fewer[1:] += moved
            local += 1
        while local < until_local:
            block = slice(local, min(local + _TOGETHER, until_local))
            fewer = _with_many(fewer, arrived[block].sum(axis=0))
            local = block.stop
        still[places[until_local]] = fewer.sum(axis=0)
    still = still.reshape(len(counts), layers, -1).swapaxes(0, 1)  # [layers, counts, times]
    # The first remote expert arrives between two times with a chance known exactly.
    until = 1 - np.exp(-mass[..., None] * _TIMES)  # [layers, counts, times]
    between = np.diff(until, axis=-1) * (still[..., 1:] + still[..., :-1]) / 2
    chance = between.sum(axis=-1) + (1 - until[..., -1]) * still[..., -1]
    result: NDArray[np.float64] = np.minimum(np.minimum(1, top_k * mass), chance)
    return result


def _with_many(fewer: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """The counts after a block of experts, `expected` of which have arrived by each time."""
    chance = np.exp(-expected)  # of none
    result = fewer * chance
    for arrivals in range(1, len(fewer)):
        chance = chance * expected / arrivals
        result[arrivals:] += fewer[:-arrivals] * chance
    return result
