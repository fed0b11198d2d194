"""Two runs side by side, with confidence intervals: is the difference more than chance?

Percentile bootstrap (Efron 1979): each run's requests are drawn again with replacement, the figure is
computed for both, and the interval holds the middle of the ratios. Requests of one run influence
each other, so that intervals are somewhat too narrow under overload; repeat runs to be sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loadgen.record import RequestRecord
from loadgen.results import RunResult
from loadgen.tables import Table, number

__all__ = ["Comparison", "Difference", "compare"]

_Figure = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of both runs; `ratio` is second over first, with its interval."""

    name: str
    first: float
    second: float
    ratio: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether 1, no difference, is outside the interval."""
        return not self.low <= 1.0 <= self.high


@dataclass(frozen=True, slots=True)
class Comparison:
    first: str
    second: str
    level: float
    resamples: int
    differences: list[Difference]
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        rows = [
            (
                d.name,
                number(d.first),
                number(d.second),
                f"{d.ratio - 1:+.1%}",
                f"{d.low - 1:+.1%} to {d.high - 1:+.1%}",
                ("more" if d.ratio > 1 else "less") if d.differs else "no clear difference",
            )
            for d in self.differences
        ]
        columns = ("", self.first, self.second, "difference", f"{self.level:.0%} interval", "")
        return Table("Comparison", columns, tuple(rows))


def compare(
    first: RunResult,
    second: RunResult,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare latencies, throughput of tokens and cost of completed requests."""
    random = np.random.default_rng(seed)
    differences = []
    for name, of, statistic in _figures():
        pair = [_values(run, of) for run in (first, second)]
        if min(len(values) for values in pair) >= 2:
            found = _difference(
                name, pair, statistic, level=level, resamples=resamples, random=random
            )
            if found is not None:
                differences.append(found)
    return Comparison(
        first.name, second.name, level, resamples, differences, _warnings(first, second)
    )


def _figures() -> list[tuple[str, Callable[[RequestRecord], float | None], _Figure]]:
    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(values.mean(axis=-1))

    def percentile(q: float) -> _Figure:
        return lambda values: np.percentile(values, q, axis=-1)

    def milliseconds(name: str) -> Callable[[RequestRecord], float | None]:
        def of(record: RequestRecord) -> float | None:
            value = getattr(record, name)
            return None if value is None else float(value) * 1e3

        return of

    figures: list[tuple[str, Callable[[RequestRecord], float | None], _Figure]] = []
    for title, name in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2e_s")):
        of = milliseconds(name)
        figures += [
            (f"{title} mean, ms", of, mean),
            (f"{title} p50, ms", of, percentile(50)),
            (f"{title} p99, ms", of, percentile(99)),
        ]
    figures += [
        ("cost of a request, µ$", _cost_micro_usd, mean),
        ("cold start wait, ms", _cold_ms, mean),
        ("remote calls of a request", _calls, mean),
    ]
    return figures


def _cost_micro_usd(record: RequestRecord) -> float | None:
    receipt = record.receipt
    return None if receipt is None or receipt.cost_usd is None else receipt.cost_usd * 1e6


def _cold_ms(record: RequestRecord) -> float | None:
    return None if record.receipt is None else record.receipt.cold_start_ms


def _calls(record: RequestRecord) -> float | None:
    return None if record.receipt is None else float(record.receipt.remote_calls)


def _values(run: RunResult, of: Callable[[RequestRecord], float | None]) -> NDArray[np.float64]:
    found = [
        of(record) for record in run.records if not record.warm_up and record.status == "completed"
    ]
    return np.array([value for value in found if value is not None])


def _difference(
    name: str,
    pair: Sequence[NDArray[np.float64]],
    statistic: _Figure,
    *,
    level: float,
    resamples: int,
    random: np.random.Generator,
) -> Difference | None:
    first, second = (float(statistic(values)) for values in pair)
    if first <= 0:
        return None  # no ratio to nothing
    drawn = [_bootstrap(values, statistic, resamples, random) for values in pair]
    positive = drawn[0] > 0
    ratios = drawn[1][positive] / drawn[0][positive]
    low, high = np.percentile(ratios, [50 * (1 - level), 50 * (1 + level)])
    return Difference(name, first, second, second / first, float(low), float(high))


def _bootstrap(
    values: NDArray[np.float64], statistic: _Figure, resamples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """The statistic of resamples, in batches that stay small in memory."""
    batch = max(1, min(resamples, 4_000_000 // len(values)))
    parts = []
    for start in range(0, resamples, batch):
        shape = (min(batch, resamples - start), len(values))
        parts.append(statistic(values[random.integers(len(values), size=shape)]))
    return np.concatenate(parts)


def _warnings(first: RunResult, second: RunResult) -> list[str]:
    """What makes the two not comparable."""
    ours, theirs = first.config, second.config
    notes = [
        f"The runs differ in {name}: {getattr(ours, name)} and {getattr(theirs, name)}."
        for name in ("arrivals", "trace", "stages", "speedup", "seed", "sample", "start_s", "end_s")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    for run in (first, second):
        requests = run.summary.requests
        if requests.completed < requests.planned:
            notes.append(
                f"{run.name}: {requests.planned - requests.completed} of {requests.planned} "
                "requests did not complete and are not compared."
            )
    return notes
