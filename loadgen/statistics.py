"""Distributions and percentiles, always computed in the same stated way."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np

__all__ = ["METHOD", "PERCENTILES", "Distribution"]

METHOD = "linear interpolation between closest ranks (numpy's default, Hyndman and Fan's type 7)"
PERCENTILES = (50.0, 90.0, 95.0, 99.0)


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Of `n` values. `std` is the population's, as numpy's and vLLM's. All None for n = 0."""

    n: int
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None], scale: float = 1.0) -> Distribution:
        """Summarize the values that are not None, times `scale` (1e3 for milliseconds)."""
        data = np.array([value for value in values if value is not None]) * scale
        if not data.size:
            return cls(n=0)
        p50, p90, p95, p99 = (float(value) for value in np.percentile(data, PERCENTILES))
        return cls(
            n=int(data.size),
            mean=float(data.mean()),
            std=float(data.std()),
            min=float(data.min()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            max=float(data.max()),
        )
