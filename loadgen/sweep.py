"""Sweep to the knee: the same run at rising rates, until the server no longer keeps up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import msgspec

from loadgen.config import LoadConfig
from loadgen.measures import Summary
from loadgen.plots.style import BLUE, GREEN, GREY, ORANGE, Plot, figure, label, legend, logarithmic
from loadgen.results import RunResult
from loadgen.tables import ABSENT, Table, number, share
from remoe.errors import SettingsError

__all__ = ["SweepPoint", "knee_of", "parse_rates", "run_sweep", "sweep_plot", "sweep_table"]

_KEEPS_UP = 0.9
_MOST_RATES = 20


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One rate; `saturated` says why the server did not keep up, None if it did."""

    rate_rps: float
    result: RunResult
    saturated: str | None


def parse_rates(text: str) -> Iterator[float]:
    """Read `1,2,4,8`, or `auto` and `auto:2`: doubling from 1 or another rate.

    Raises SettingsError.
    """
    if text.startswith("auto"):
        _, _, first = text.partition(":")
        try:
            rate = float(first or 1)
        except ValueError as error:
            raise SettingsError(f"--sweep {text}: {first!r} is no rate") from error
        if rate <= 0:
            raise SettingsError(f"--sweep {text}: rates are above 0")
        return (rate * 2**step for step in range(_MOST_RATES))
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingsError(f"--sweep {text!r} is neither auto nor rates like 1,2,4") from error
    if sorted(set(rates)) != rates or rates[0] <= 0:
        raise SettingsError(f"--sweep {text!r}: rates must rise, from above 0")
    return iter(rates)


async def run_sweep(
    config: LoadConfig,
    rates: Iterator[float],
    run: Callable[[LoadConfig, str], Awaitable[RunResult]],
    *,
    duration_s: float,
) -> list[SweepPoint]:
    """Run rate after rate, each in a folder of its own, and stop after the first saturated one."""
    points: list[SweepPoint] = []
    for rate in rates:
        staged = msgspec.structs.replace(
            config,
            stages=f"{rate:g}@{duration_s:g}s",
            warm_up=config.warm_up if not points else 0,
            arrivals="poisson" if config.arrivals in {"trace", "closed"} else config.arrivals,
        )
        result = await run(staged, f"rate-{rate:g}")
        points.append(SweepPoint(rate, result, _saturation(result.summary, result.target.stopped)))
        if points[-1].saturated or result.target.stopped:
            break
    return points


def _saturation(summary: Summary, stopped: str | None) -> str | None:
    """Completed less than 90 % of what was offered while it was offered, or an SLO was missed."""
    if stopped:
        return stopped
    requests = summary.requests
    lost = requests.planned - requests.completed
    if lost > (1 - _KEEPS_UP) * requests.planned:
        return f"{lost} of {requests.planned} requests did not complete"
    if not summary.passed:
        missed = next(result.objective for result in summary.slo if not result.passed)
        return f"{missed} is missed"
    offered = requests.offered_rps
    # A run goes on for the last request's own time, which is no sign of a queue.
    tail_s = (summary.latency.e2e_ms.p50 or 0.0) / 1e3
    busy_s = max(summary.duration_s - tail_s, 1e-9)
    if offered and requests.completed / busy_s < _KEEPS_UP * offered:
        return (
            f"{number(requests.completed / busy_s)} of {number(offered)} requests/s were completed"
        )
    return None


def knee_of(points: list[SweepPoint]) -> SweepPoint | None:
    """The highest rate that the server kept up with."""
    held = [point for point in points if point.saturated is None]
    return held[-1] if held else None


def sweep_table(points: list[SweepPoint]) -> Table:
    """A row a rate; goodput and cost only where there is any. Narrow enough for a terminal."""
    columns: dict[str, list[str]] = {}
    for point in points:
        summary = point.result.summary
        cost = summary.cost.per_request_usd.mean if summary.cost else None
        cells = {
            "offered": f"{point.rate_rps:g}",
            "done": number(summary.requests.throughput_rps),
            "tokens/s": number(summary.tokens.output_per_s),
            "TTFT p50": number(summary.latency.ttft_ms.p50),
            "TTFT p99": number(summary.latency.ttft_ms.p99),
            "TPOT p50": number(summary.latency.tpot_ms.p50),
            "goodput": share(summary.goodput_share),
            "µ$": number(None if cost is None else cost * 1e6),
            "keeps up": "no" if point.saturated else "yes",
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    shown = {name: cells for name, cells in columns.items() if set(cells) != {ABSENT}}
    return Table(
        "Sweep: requests and tokens a second, ms, µ$ a request",
        tuple(shown),
        tuple(zip(*shown.values(), strict=True)),
    )


def sweep_plot(points: list[SweepPoint]) -> Plot:
    """Throughput and latency against the offered rate, with the knee."""
    drawn, (rate, latency) = figure(1, 2, height=3.2)
    offered = [point.rate_rps for point in points]
    done = [point.result.summary.requests.throughput_rps for point in points]
    rate.plot(offered, offered, color=GREY, linestyle="--", label="offered")
    rate.plot(offered, done, color=BLUE, marker="o", label="completed")
    goodput = [point.result.summary.goodput_rps for point in points]
    if all(value is not None for value in goodput):
        rate.plot(offered, [v or 0.0 for v in goodput], color=GREEN, marker="o", label="goodput")
    for name, colour in (("p50", BLUE), ("p99", ORANGE)):
        values = [getattr(p.result.summary.latency.ttft_ms, name) for p in points]
        latency.plot(offered, values, color=colour, marker="o", label=f"TTFT {name}")
    knee = knee_of(points)
    for axes in (rate, latency):
        if knee is not None:
            axes.axvline(knee.rate_rps, color=ORANGE, linewidth=1, linestyle=":", label="knee")
        legend(axes)
    logarithmic(latency, "y")
    label(rate, "offered, requests/s", "requests/s")
    label(latency, "offered, requests/s", "ms")
    caption = (
        f"The server keeps up to {knee.rate_rps:g} requests/s."
        if knee
        else "The server does not keep up with the lowest rate."
    )
    return Plot("Throughput and latency by rate", caption, drawn)
