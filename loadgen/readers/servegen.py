"""ServeGen's client rates: per client and window, how fast and how bursty requests came.

Rows `window_start_s,client,rate_rps,iat_cv,iat_family,param1,param2` are statistics of production
traffic; single requests are drawn from them. Inter-arrival times are Gamma or Weibull with
shape `param1` and scale `param2` in seconds (Xiang et al., arXiv 2505.09999).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import gamma, isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadgen.readers.text_files import rows_of
from loadgen.trace import ReadOptions, TracedRequest, TraceError

__all__ = ["read_servegen_rates"]

_COLUMNS = ["window_start_s", "client", "rate_rps", "iat_cv", "iat_family", "param1", "param2"]
_DEFAULT_WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class _Cell:
    """One client in one window."""

    window_s: float
    client: int
    rate_rps: float
    family: str
    shape: float
    scale_s: float

    def arrivals_s(self, length_s: float, random: np.random.Generator) -> NDArray[np.float64]:
        """Offsets in the window, sorted: a renewal process stopped at the window's end.

        Gaps are rescaled to the stated rate, from which a fitted distribution's mean can be off.
        The first gap is shortened uniformly, since a window begins between two arrivals.
        """
        is_gamma = self.family == "Gamma"
        fitted_mean_s = self.scale_s * (self.shape if is_gamma else gamma(1 + 1 / self.shape))
        rescale = 1 / (self.rate_rps * fitted_mean_s)
        batch = int(self.rate_rps * length_s) + 16
        times = np.zeros(0)
        while not times.size or times[-1] < length_s:
            gaps = rescale * (
                random.gamma(self.shape, self.scale_s, batch)
                if is_gamma
                else random.weibull(self.shape, batch) * self.scale_s
            )
            if not times.size:
                gaps[0] *= random.random()
            times = np.concatenate([times, (times[-1] if times.size else 0.0) + np.cumsum(gaps)])
        return times[times < length_s]


def read_servegen_rates(path: Path, options: ReadOptions | None = None) -> Iterator[TracedRequest]:
    """Draw all clients' arrivals, window after window.

    A window's arrivals depend on the seed, the window and the client alone, so that a replay may
    begin anywhere.
    """
    options = options or ReadOptions()
    cells = sorted(_cells(path), key=lambda cell: (cell.window_s, cell.client))
    windows = [(start, list(group)) for start, group in groupby(cells, lambda cell: cell.window_s)]
    if not windows:
        return
    origin_s = windows[0][0]
    ends_s = [start for start, _ in windows[1:]]
    last_length_s = ends_s[-1] - windows[-2][0] if ends_s else _DEFAULT_WINDOW_S
    for index, (start_s, group) in enumerate(windows):
        end_s = ends_s[index] if index < len(ends_s) else start_s + last_length_s
        if end_s - origin_s <= options.start_s:
            continue
        drawn = [
            cell.arrivals_s(
                end_s - start_s,
                np.random.default_rng([options.seed, int(start_s), cell.client]),
            )
            for cell in group
            if cell.rate_rps > 0
        ]
        if drawn:
            for offset_s in np.sort(np.concatenate(drawn)):
                yield TracedRequest(start_s - origin_s + float(offset_s))


def _cells(path: Path) -> Iterator[_Cell]:
    for line, row in rows_of(path, _COLUMNS):
        try:
            rate = float(row[2])
            cell = _Cell(
                window_s=float(row[0]),
                client=int(row[1]),
                rate_rps=rate,
                family=row[4],
                shape=float(row[5]) if rate else 1.0,
                scale_s=float(row[6]) if rate else 1.0,
            )
        except ValueError as error:
            raise TraceError(f"{path}:{line}: {row}: {error}") from error
        if rate and cell.family not in {"Gamma", "Weibull"}:
            raise TraceError(f"{path}:{line}: iat_family is {cell.family!r}, not Gamma or Weibull")
        if not (isfinite(rate) and rate >= 0 and cell.shape > 0 and cell.scale_s > 0):
            raise TraceError(f"{path}:{line}: {row}: rates and parameters are positive numbers")
        yield cell
