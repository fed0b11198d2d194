"""How likely one token needs a remote expert of a layer, from the layer's shares alone.

A token uses k distinct experts, so the k draws are without replacement: the model is successive
sampling with the shares as weights, as if experts raced with exponential times of these rates and
the first k were used. The token stays local if k local experts arrive before any remote one.
Shares do not say which experts go together, so this is an approximation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["remote_call_chance"]

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)


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
