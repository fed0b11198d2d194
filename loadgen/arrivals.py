"""Arrival processes: constant, Poisson and gamma gaps on any rate profile.

`burstiness` is vLLM's: the shape of gamma-distributed gaps of mean 1. 1 is Poisson, less is
burstier, more is smoother; infinity is constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import numpy as np

from loadgen.rates import RateProfile

__all__ = ["CONSTANT", "POISSON", "arrival_times"]

CONSTANT = inf
POISSON = 1.0


def arrival_times(
    profile: RateProfile, *, burstiness: float, random: np.random.Generator
) -> Iterator[float]:
    """Yield seconds from the start, increasing, up to the profile's end.

    Without a last-moment correction: the number of arrivals of a random process is random. A
    constant process begins with an arrival at 0.
    """
    total = profile.requests
    count = 0.0 if burstiness == CONSTANT else _gap(burstiness, random)
    while count < total * (1 - 1e-12):
        yield profile.time_of(count)
        count += _gap(burstiness, random)


def _gap(burstiness: float, random: np.random.Generator) -> float:
    if burstiness == CONSTANT:
        return 1.0
    return float(random.gamma(burstiness, 1.0 / burstiness))
