"""How far a predicted profile is from what happened: Jensen-Shannon divergence (A.13)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remoe.experts import ActivationProfile

__all__ = ["js_divergence", "profile_divergence"]


def js_divergence(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the divergence in nats over the last axis; 0 when equal, at most ln 2."""
    p = first.astype(np.float64)
    q = second.astype(np.float64)
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _relative_entropy(p: NDArray[np.float64], middle: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio = np.divide(p, middle, out=np.ones_like(p), where=p > 0)
    result: NDArray[np.float64] = (p * np.log(ratio)).sum(axis=-1)
    return result


def profile_divergence(predicted: ActivationProfile, observed: ActivationProfile) -> float:
    """Mean over the layers that the observed prompt used, in nats."""
    used = observed.shares.any(axis=1)  # [layers]
    if not used.any():
        return 0.0
    return float(js_divergence(predicted.shares[used], observed.shares[used]).mean())
