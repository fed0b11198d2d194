"""Service level objectives: `ttft_p99<2s` for the run, `tpot<100ms` for each of its requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from loadgen.record import RequestRecord
from remoe.errors import SettingsError

__all__ = ["Objective", "SloResult", "judge", "meets_all"]

_OBJECTIVE = re.compile(
    r"(?P<metric>[a-z_0-9]+?)(?:_(?P<stat>p\d{1,2}(?:\.\d+)?|mean|max))?\s*"
    r"(?P<sign><=?|>=?)\s*(?P<value>\d+(?:\.\d+)?(?:e-?\d+)?)\s*(?P<unit>[a-z%/$]*)"
)
_LATENCIES = ("ttft", "tpot", "itl", "e2e", "lag")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_SHARES = ("goodput", "error_rate")
_RATES = ("request_throughput", "output_throughput")
_COSTS = ("cost_per_request",)


@dataclass(frozen=True, slots=True)
class Objective:
    """`stat` is "p99" or the like, "mean", "max"; None for a bound on each request or a plain
    figure of the run. `bound` is in seconds, shares, requests or tokens a second, or USD."""

    text: str
    metric: str
    stat: str | None
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read one objective; raises SettingsError that says what can be written."""
        found = _OBJECTIVE.fullmatch(text.strip())
        metric = found["metric"] if found else ""
        if found is None or metric not in (*_LATENCIES, *_SHARES, *_RATES, *_COSTS):
            raise SettingsError(
                f"the objective {text!r} is not understood. Write for example ttft_p99<2s, "
                f"tpot<100ms (each request), goodput>95%, error_rate<1%; latencies are "
                f"{', '.join(_LATENCIES)}, other figures {', '.join((*_SHARES, *_RATES, *_COSTS))}."
            )
        value, unit = float(found["value"]), found["unit"]
        if metric in _LATENCIES:
            if unit not in _SECONDS:
                raise SettingsError(f"the objective {text!r} needs a unit: s, ms or us")
            if ">" in found["sign"]:
                raise SettingsError(f"the objective {text!r}: latencies have an upper bound, <")
            if metric == "itl" and found["stat"] is None:
                raise SettingsError(
                    f"the objective {text!r}: ITL has many values a request; write itl_p99<..."
                )
            value *= _SECONDS[unit]
        elif found["stat"] is not None:
            raise SettingsError(f"the objective {text!r}: {metric} has no percentiles")
        elif metric in _SHARES:
            value *= 0.01 if unit == "%" else 1.0
        return cls(text.strip(), metric, found["stat"], found["sign"], value)

    @property
    def each_request(self) -> bool:
        """Whether the bound is on single requests."""
        return self.metric in _LATENCIES and self.stat is None

    def holds(self, value: float) -> bool:
        return {
            "<": value < self.bound,
            "<=": value <= self.bound,
            ">": value > self.bound,
            ">=": value >= self.bound,
        }[self.sign]


class SloResult(msgspec.Struct, frozen=True, kw_only=True):
    """`actual` is None where nothing was measured; that is not a pass."""

    objective: str
    actual: float | None
    passed: bool


def meets_all(record: RequestRecord, objectives: Sequence[Objective]) -> bool:
    """Whether a request is good: completed, and within every bound on its latencies.

    A run's `ttft_p99<2s` bounds a good request too. A request with one token has no TPOT and
    cannot break its bound.
    """
    if record.status != "completed":
        return False
    for objective in objectives:
        if objective.metric in _LATENCIES and objective.metric != "itl":
            value = _value(record, objective.metric)
            if value is not None and not objective.holds(value):
                return False
    return True


def judge(
    records: Sequence[RequestRecord], objectives: Sequence[Objective], figures: dict[str, float]
) -> list[SloResult]:
    """Judge a run. `figures` has what is no latency: goodput (share), error_rate, and the like.

    A bound on each request passes if the share of requests within it reaches the run's goodput
    objective, and all of them if there is none. Requests that failed are not within it.
    """
    goodput = next((o.bound for o in objectives if o.metric == "goodput"), 1.0)
    results = []
    for objective in objectives:
        actual: float | None
        if objective.each_request:
            within = [meets_all(record, [objective]) for record in records]
            actual = sum(within) / len(within) if within else None
            passed = actual is not None and actual >= goodput
        elif objective.stat is not None:
            actual = _statistic(records, objective.metric, objective.stat)
            passed = actual is not None and objective.holds(actual)
        else:
            actual = figures.get(objective.metric)
            passed = actual is not None and objective.holds(actual)
        results.append(SloResult(objective=objective.text, actual=actual, passed=passed))
    return results


def _value(record: RequestRecord, metric: str) -> float | None:
    return {
        "ttft": record.ttft_s,
        "tpot": record.tpot_s,
        "e2e": record.e2e_s,
        "lag": record.lag_s,
    }[metric]


def _statistic(records: Sequence[RequestRecord], metric: str, stat: str) -> float | None:
    if metric == "itl":
        values = [gap for r in records if r.status == "completed" for gap in r.itl_s]
    else:
        found = [_value(r, metric) for r in records if r.status == "completed" or metric == "lag"]
        values = [value for value in found if value is not None]
    if not values:
        return None
    if stat == "mean":
        return float(np.mean(values))
    return float(np.percentile(values, 100.0 if stat == "max" else float(stat[1:])))
