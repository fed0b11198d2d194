"""Azure's function traces: arrivals of a serverless platform, without tokens.

Two forms are published: invocations per function and minute (2019: `HashOwner,HashApp,HashFunction,
Trigger,1,2,...,1440`), and single invocations by their end and duration (2021). Sources:
Azure/AzurePublicDataset; Shahrad et al., USENIX ATC'20; Zhang et al., SOSP'21.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from loadgen.readers.text_files import rows_of
from loadgen.trace import ReadOptions, TracedRequest, TraceError

__all__ = ["read_azure_function_counts", "read_azure_function_invocations"]

_MINUTE_S = 60.0
_KEY_COLUMNS = ["HashOwner", "HashApp", "HashFunction", "Trigger"]


def read_azure_function_counts(
    path: Path, options: ReadOptions | None = None
) -> Iterator[TracedRequest]:
    """Spread each minute's invocations of all functions over it: the data do not say when.

    Uniformly at random, as a Poisson process of known count is. Deterministic by seed and minute.
    """
    options = options or ReadOptions()
    totals: list[int] = []
    for line, row in rows_of(path, _KEY_COLUMNS):
        try:
            counts = [int(cell) for cell in row[len(_KEY_COLUMNS) :]]
        except ValueError as error:
            raise TraceError(f"{path}:{line}: {error}; counts are whole numbers") from error
        if any(count < 0 for count in counts):
            raise TraceError(f"{path}:{line}: a negative count")
        totals.extend([0] * (len(counts) - len(totals)))
        for minute, count in enumerate(counts):
            totals[minute] += count
    first = int(options.start_s // _MINUTE_S)
    for minute, count in enumerate(totals[first:], start=first):
        random = np.random.default_rng([options.seed, minute])
        for second in np.sort(random.uniform(0.0, _MINUTE_S, count)):
            yield TracedRequest(minute * _MINUTE_S + float(second))


def read_azure_function_invocations(
    path: Path, options: ReadOptions | None = None
) -> Iterator[TracedRequest]:
    """Yield invocations by their start (end minus duration), earliest first, counted from it."""
    starts_s: list[float] = []
    for line, row in rows_of(path, ["app", "func", "end_timestamp", "duration"]):
        try:
            end_s, duration_s = float(row[2]), float(row[3])
        except ValueError as error:
            raise TraceError(f"{path}:{line}: {error}; end and duration are seconds") from error
        starts_s.append(end_s - duration_s)
    starts_s.sort()
    for start_s in starts_s:
        yield TracedRequest(start_s - starts_s[0])
