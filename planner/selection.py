"""Which experts are remote: in each layer the b·K least used (A.10).

Use is expected routes, of prefill and decode together: `PhaseProfiles.mixed` has their shares.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from remoe.experts import ActivationProfile, Partition

__all__ = ["remote_mask", "select_remote"]

# 0.3 * 10 is 3, whatever binary fractions make of it.
_ROUNDING = 1e-9


def select_remote(profile: ActivationProfile, ratio: float) -> Partition:
    """Make the ⌊ratio·K⌋ experts of lowest share remote in every layer with experts.

    Expected routes are a constant times the share inside one layer, so shares alone decide. Among
    equals the lower index stays local. A layer whose row is all zero is dense and keeps none.
    """
    count = math.floor(ratio * profile.experts + _ROUNDING)
    last = profile.experts - 1
    # Stable from the highest index down: of equal experts the higher index becomes remote first.
    order = last - np.argsort(profile.shares[:, ::-1], axis=1, kind="stable")  # [layers, experts]
    dense = profile.shares.max(axis=1) == 0  # [layers]
    return Partition(
        experts=profile.experts,
        remote=tuple(
            () if is_dense else tuple(sorted(lowest))
            for lowest, is_dense in zip(order[:, :count].tolist(), dense.tolist(), strict=True)
        ),
    )


def remote_mask(partition: Partition) -> NDArray[np.bool_]:
    """Return bool [layers, experts], true where the expert is remote."""
    mask = np.zeros((partition.layers, partition.experts), dtype=np.bool_)
    for layer, indices in enumerate(partition.remote):
        mask[layer, list(indices)] = True
    return mask
