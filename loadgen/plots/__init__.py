"""The plots of a report, each a function of a run; `all_plots` has them in reading order."""

from __future__ import annotations

from loadgen.plots.bill import ParetoPoint, cost_over_time, latency_against_cost, pareto
from loadgen.plots.experts import expert_heat_maps
from loadgen.plots.style import Plot, svg_data_uri
from loadgen.plots.traffic import (
    arrivals_and_completions,
    in_flight_and_replicas,
    latency_cdfs,
    latency_timeline,
)
from loadgen.results import RunResult

__all__ = [
    "ParetoPoint",
    "Plot",
    "all_plots",
    "arrivals_and_completions",
    "cost_over_time",
    "expert_heat_maps",
    "in_flight_and_replicas",
    "latency_against_cost",
    "latency_cdfs",
    "latency_timeline",
    "pareto",
    "svg_data_uri",
]


def all_plots(result: RunResult) -> list[Plot]:
    """Draw the seven plots of a run."""
    return [
        arrivals_and_completions(result),
        latency_cdfs(result),
        latency_timeline(result),
        in_flight_and_replicas(result),
        cost_over_time(result),
        latency_against_cost(result),
        expert_heat_maps(result),
    ]
