"""What is in a trace, before it is replayed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from loadgen.readers import detect_format, read_trace
from loadgen.statistics import Distribution
from loadgen.tables import Table, number
from loadgen.trace import ReadOptions, Selection

__all__ = ["describe_trace"]

_MOST = 1_000_000


def describe_trace(
    path: Path, *, seed: int = 0, start_s: float = 0.0, end_s: float | None = None
) -> Table:
    """Count, rate, burstiness and lengths of a trace's window, a million requests at most."""
    requests = read_trace(path, ReadOptions(seed=seed, start_s=start_s))
    kept = list(islice(Selection(start_s=start_s, end_s=end_s).apply(requests), _MOST))
    times = np.array([request.arrival_s for request in kept])
    gaps = np.diff(times)
    span = float(times[-1] - times[0]) if len(times) > 1 else 0.0
    busiest = np.bincount((times / 60).astype(int)).max() if len(times) else 0
    rows = [
        ("format", detect_format(path)),
        ("requests", number(len(kept)) + (" (the first ones)" if len(kept) == _MOST else "")),
        ("span", f"{number(span)} s"),
        ("mean rate", f"{number(len(kept) / span if span else None)} requests/s"),
        ("busiest minute", f"{number(busiest / 60)} requests/s"),
        (
            "burstiness (cv of gaps; 1 is Poisson)",
            number(float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() else None),
        ),
        ("longest silence", f"{number(float(gaps.max()) if len(gaps) else None)} s"),
    ]
    for name, values in (
        ("prompt tokens", [request.prompt_tokens for request in kept]),
        ("output tokens", [request.output_tokens for request in kept]),
    ):
        lengths = Distribution.of(values)
        figures = (lengths.p50, lengths.mean, lengths.p99, lengths.max)
        shown = " / ".join(number(value) for value in figures) if lengths.n else "not in this trace"
        rows.append((f"{name}, p50 / mean / p99 / max", shown))
    return Table(path.name, ("", ""), tuple(rows))
