"""From predicted loads to a layer's next placement: scaler, then placer, alike on every rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.placement import Placement
from remoe.moeless.placer import place
from remoe.moeless.scaler import CV_THRESHOLD, scale

__all__ = ["next_placement"]


def next_placement(
    loads: NDArray[np.float64],
    current: Placement,
    *,
    warm: Placement,
    slots: int,
    cv_threshold: float = CV_THRESHOLD,
    warm_slack: float | None = 0.05,
    least_gain: float = 0.03,
) -> Placement:
    """Where replicas for `loads` [experts] should be, with `slots` on each rank.

    Every expert keeps one, since a load may be predicted wrongly, and none has two on one rank,
    where they would share the computing. Ours: `warm_slack` is papers.md B.5's guard, and
    `current` stays unless the largest load of a rank falls by `least_gain` of it: moving an expert
    is not free.
    """
    ranks, experts = current.gpus, len(loads)
    replicas = scale(loads, most_added=slots * ranks - experts, cv_threshold=cv_threshold)
    found = place(
        loads,
        np.minimum(replicas, ranks),
        ranks,
        warm=warm,
        room=[slots] * ranks,
        warm_slack=warm_slack,
    )
    largest = current.gpu_loads(loads).max()
    return found if found.gpu_loads(loads).max() < (1 - least_gain) * largest else current
