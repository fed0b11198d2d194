"""What the load cost: memory-seconds and dollars over time, and cost against latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from loadgen.plots.style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Plot,
    figure,
    label,
    legend,
    logarithmic,
)
from loadgen.plots.traffic import measured, numbers, time_bins
from loadgen.receipt import Receipt
from loadgen.record import RequestRecord
from loadgen.results import RunResult

__all__ = ["ParetoPoint", "cost_over_time", "latency_against_cost", "pareto", "pareto_front"]

_TIME = "time since the start, s"
_MOST_PLANS = 6


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    name: str
    latency_s: float
    cost_usd: float


def cost_over_time(result: RunResult) -> Plot:
    """GB·s by what held them, and the bill as it grew.

    A request's GB·s are spread evenly over the time it was in flight.
    """
    title = "Memory and cost over time"
    records = [
        record
        for record in measured(result)
        if record.receipt is not None
        and record.receipt.main_gb_s is not None
        and record.sent_s is not None
        and record.last_s is not None
    ]
    if not records:
        return Plot(
            title,
            "Nothing to draw: the server's replies carry no memory times or costs (x_remoe). For "
            "another server, --usd-per-hour gives a cost per request.",
            None,
        )
    edges = time_bins(result)
    length = edges[1] - edges[0]
    parts: list[tuple[str, str, Callable[[Receipt], float]]] = [
        ("main function, GPU", ORANGE, lambda r: r.main_gpu_gb_s or 0.0),
        ("main function, CPU", BLUE, lambda r: (r.main_gb_s or 0.0) - (r.main_gpu_gb_s or 0.0)),
        ("expert functions", GREEN, lambda r: r.remote_gb_s or 0.0),
    ]
    drawn, (memory, bill) = figure(2, 1, height=4.8, sharex=True)
    rows = [_spread(records, edges, of) for _, _, of in parts]
    shown = [(*part[:2], row) for part, row in zip(parts, rows, strict=True) if row.any()]
    if shown:
        memory.stackplot(
            edges,
            [np.append(row, row[-1]) / length for _, _, row in shown],
            labels=[f"{name}: {row.sum():.1f} GB·s" for name, _, row in shown],
            colors=[colour for _, colour, _ in shown],
            step="post",
            linewidth=0,
        )
    if result.samples:
        memory.step(
            [sample.at_s for sample in result.samples],
            [sample.gb for sample in result.samples],
            where="post",
            color=RED,
            linewidth=1.2,
            label="held by all replicas (resident)",
        )
    memory.set_ylim(bottom=0)
    legend(memory)
    label(memory, "", "GB (GB·s each second)")
    _draw_bill(bill, records)
    return Plot(
        title,
        "Top: memory that requests were billed for (memory held times time busy), by function. "
        "Bottom: the bill as requests end.",
        drawn,
    )


def _draw_bill(axes: Axes, records: Sequence[RequestRecord]) -> None:
    priced = sorted(
        (record for record in records if record.receipt and record.receipt.cost_usd is not None),
        key=lambda record: record.last_s or 0.0,
    )
    times = numbers(record.last_s for record in priced)
    ledgers: list[tuple[str, str, Callable[[Receipt], float | None]]] = [
        ("busy ledger", BLUE, lambda r: r.cost_usd),
        ("resident ledger", RED, lambda r: r.resident.cost_usd if r.resident else None),
    ]
    for name, colour, of in ledgers:
        found = [of(record.receipt) for record in priced if record.receipt]
        if found and all(cost is not None for cost in found):
            total = np.cumsum([cost or 0.0 for cost in found])
            words = f"{name}, {total[-1] * 1e3:.3g} m$ for n = {len(found)}"
            axes.step(times, total * 1e3, where="post", color=colour, label=words)
    if priced:
        legend(axes, loc="upper left")
    axes.set_ylim(bottom=0)
    label(axes, _TIME, "bill so far, m$ (thousandths)")


def _spread(
    records: Sequence[RequestRecord], edges: np.ndarray, of: Callable[[Receipt], float]
) -> np.ndarray:
    """Sum an amount of each request into bins, in proportion to its time in each."""
    bins = np.zeros(len(edges) - 1)
    for record in records:
        if record.receipt is None or record.sent_s is None or record.last_s is None:
            continue
        begin, end = record.sent_s, max(record.last_s, record.sent_s + 1e-9)
        overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
        bins += of(record.receipt) * overlap.clip(0) / (end - begin)
    return bins


def latency_against_cost(result: RunResult) -> Plot:
    """Every request by its E2E latency and its cost, and its plan's middle."""
    title = "Latency against cost, by plan"
    plans: dict[str, list[tuple[float, float]]] = {}
    for record in measured(result):
        receipt = record.receipt
        if record.e2e_s is not None and receipt is not None and receipt.cost_usd is not None:
            name = receipt.deployment_plan_id or "unknown plan"
            plans.setdefault(name, []).append((record.e2e_s, receipt.cost_usd))
    if not plans:
        return Plot(title, "Nothing to draw: the server's replies carry no cost (x_remoe).", None)
    drawn, (axes,) = figure(height=3.6)
    shown = sorted(plans.items(), key=lambda plan: -len(plan[1]))[:_MOST_PLANS]
    points = []
    for (name, found), colour in zip(shown, COLOURS, strict=False):
        latency, cost = np.array(found).T
        axes.plot(
            latency,
            cost * 1e6,
            linestyle="none",
            marker="o",
            markersize=3.2,
            markeredgewidth=0,
            alpha=0.45,
            color=colour,
            rasterized=len(found) > 2000,
        )
        point = ParetoPoint(name, float(np.median(latency)), float(np.median(cost)))
        points.append(point)
        axes.plot(
            point.latency_s,
            point.cost_usd * 1e6,
            marker="D",
            markersize=8,
            color=colour,
            markeredgecolor="black",
            linestyle="none",
            label=f"{name[-24:]}, n = {len(found)}",
        )
    front = pareto_front(points)
    axes.plot(
        [p.latency_s for p in front], [p.cost_usd * 1e6 for p in front], color=GREY, linewidth=1
    )
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    legend(axes, title="deployment plan (diamond: medians)", title_fontsize=8)
    label(axes, "end to end, s", "cost of a request, µ$")
    left_out = len(plans) - len(shown)
    return Plot(
        title,
        "One dot a request. Down and to the left is better; the grey line joins the plans that no "
        "other plan beats on both."
        + (f" {left_out} plans with fewer requests are left out." if left_out else ""),
        drawn,
    )


def pareto_front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """The points that no other one beats in latency and cost, by rising latency."""
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.latency_s, p.cost_usd)):
        if not front or point.cost_usd < front[-1].cost_usd:
            front.append(point)
    return front


def pareto(points: Sequence[ParetoPoint], *, latency: str = "median E2E, s") -> Plot:
    """Several runs against each other, with the Pareto front."""
    title = "Runs: latency against cost"
    if not points:
        return Plot(title, "Nothing to draw: no run has a cost.", None)
    drawn, (axes,) = figure(height=3.6)
    for point, colour in zip(points, COLOURS * len(points), strict=False):
        axes.plot(
            point.latency_s, point.cost_usd * 1e6, "D", color=colour, markersize=8, label=point.name
        )
    front = pareto_front(points)
    axes.plot(
        [p.latency_s for p in front], [p.cost_usd * 1e6 for p in front], color=GREY, linewidth=1
    )
    legend(axes)
    label(axes, latency, "mean cost of a request, µ$")
    return Plot(title, "Down and to the left is better.", drawn)
