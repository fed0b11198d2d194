"""Traffic over time: arrivals and completions, latencies, what was in flight and how many ran it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

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
from loadgen.record import RequestRecord
from loadgen.results import RunResult
from loadgen.tables import number

__all__ = ["arrivals_and_completions", "in_flight_and_replicas", "latency_cdfs", "latency_timeline"]

_MANY_POINTS = 2000
_TIME = "time since the start, s"


def measured(result: RunResult) -> list[RequestRecord]:
    return [record for record in result.records if not record.warm_up]


def numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    """As an array, with NaN, which no plot draws, for what is not known."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def time_bins(result: RunResult, most: int = 120) -> np.ndarray:
    """Edges of equal bins over the run, of a round length, at most `most` of them."""
    end = max(result.summary.duration_s, result.target.span_s, 1.0)
    lengths = [m * 10.0**p for p in range(-1, 5) for m in (1, 2, 5)]
    length = next(value for value in lengths if end / value <= most)
    return np.arange(0.0, end + length, length)


def arrivals_and_completions(result: RunResult) -> Plot:
    """Offered and achieved rate; where they part, the server queues."""
    records = measured(result)
    edges = time_bins(result)
    length = edges[1] - edges[0]
    arrivals = [
        r.intended_s if r.intended_s is not None else r.sent_s
        for r in records
        if r.intended_s is not None or r.sent_s is not None
    ]
    done = [r.last_s for r in records if r.status == "completed" and r.last_s is not None]
    lost = [
        r.last_s if r.last_s is not None else r.intended_s
        for r in records
        if r.status != "completed"
    ]
    drawn, (rate, total) = figure(1, 2, height=3.0)
    for values, colour, name in ((arrivals, GREY, "arrivals"), (done, BLUE, "completions")):
        counts, _ = np.histogram(np.array(values, float), edges)
        rate.stairs(counts / length, edges, color=colour, label=f"{name}, n = {len(values)}")
        times = np.sort(np.array(values, float))
        total.step(times, np.arange(1, len(times) + 1), where="post", color=colour, label=name)
    if lost:
        counts, _ = np.histogram(np.array(lost, float), edges)
        rate.stairs(counts / length, edges, color=RED, label=f"not completed, n = {len(lost)}")
    label(rate, _TIME, f"requests/s, in bins of {length:g} s")
    label(total, _TIME, "requests so far")
    rate.set_ylim(bottom=0)
    for axes in (rate, total):
        legend(axes)
    return Plot(
        "Arrivals and completions",
        "What was to be sent and what was answered. Where the curves on the right part, requests "
        "wait; the load generator never waits for the server.",
        drawn,
    )


def latency_cdfs(result: RunResult) -> Plot:
    """Cumulative distributions of TTFT, TPOT and E2E."""
    records = measured(result)
    drawn, axes = figure(1, 3, height=3.0)
    kinds = (
        ("TTFT", "time to first token, s", [r.ttft_s for r in records if r.status == "completed"]),
        ("TPOT", "time per further token, ms", [r.tpot_s for r in records]),
        ("E2E", "end to end, s", [r.e2e_s for r in records]),
    )
    for axis, (name, unit, found) in zip(axes, kinds, strict=True):
        scale = 1e3 if unit.endswith("ms") else 1.0
        values = np.sort([value for value in found if value is not None]) * scale
        label(
            axis, unit, "share of requests" if name == "TTFT" else "", f"{name}, n = {len(values)}"
        )
        axis.set_ylim(0, 1.02)
        if not len(values):
            continue
        axis.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=BLUE)
        if values[0] > 0 and values[-1] / values[0] > 30:
            logarithmic(axis, "x")
        for q, colour in ((50, GREEN), (90, ORANGE), (99, RED)):
            at = float(np.percentile(values, q))
            axis.axvline(
                at, color=colour, linewidth=1, linestyle="--", label=f"p{q} {number(at, 3)}"
            )
        legend(axis, loc="lower right")
    return Plot(
        "Latency distributions",
        "Of completed requests, counted from the moment each was really sent.",
        drawn,
    )


def latency_timeline(result: RunResult) -> Plot:
    """Each request's TTFT and E2E at its arrival, coloured by whether it met a cold start."""
    done = [record for record in measured(result) if record.status == "completed"]
    groups: dict[str, tuple[str, list[RequestRecord]]] = {
        "warm": (BLUE, [r for r in done if r.receipt and r.receipt.cold_start_ms <= 0]),
        "waited for a cold start": (
            RED,
            [r for r in done if r.receipt and r.receipt.cold_start_ms],
        ),
        "not reported": (GREY, [r for r in done if r.receipt is None]),
    }
    drawn, axes = figure(2, 1, height=4.6, sharex=True)
    for axis, name in zip(axes, ("TTFT", "E2E"), strict=True):
        for words, (colour, records) in groups.items():
            if records:
                _dots(axis, records, name, colour, f"{words}, n = {len(records)}")
        _log_if_wide(axis, [r.ttft_s if name == "TTFT" else r.e2e_s for r in done])
        label(axis, _TIME if name == "E2E" else "", f"{name}, s")
    if done:
        legend(axes[0], loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    for record in measured(result):
        if record.status not in {"completed", "skipped"} and record.sent_s is not None:
            axes[1].axvline(record.sent_s, color=RED, alpha=0.25, linewidth=0.6)
    return Plot(
        "Latency over time, cold and warm",
        "One dot a request, at the time it was sent. Orange dots waited for a function at zero; "
        "orange lines are requests that failed.",
        drawn,
    )


def _log_if_wide(axis: Axes, values: list[float | None]) -> None:
    """A logarithmic axis from a factor of ten on; else one that begins at zero."""
    known = [value for value in values if value]
    if known and max(known) > 10 * min(known):
        logarithmic(axis, "y")
    else:
        axis.set_ylim(bottom=0)


def _dots(axes: Axes, records: list[RequestRecord], name: str, colour: str, words: str) -> None:
    axes.plot(
        numbers(record.sent_s for record in records),
        numbers(record.ttft_s if name == "TTFT" else record.e2e_s for record in records),
        linestyle="none",
        marker="o",
        markersize=3.2 if len(records) < _MANY_POINTS else 1.6,
        markeredgewidth=0,
        alpha=0.7,
        color=colour,
        label=words,
        rasterized=len(records) > _MANY_POINTS,
    )


def in_flight_and_replicas(result: RunResult) -> Plot:
    """Requests in flight as the client saw them, and the replicas that served them."""
    changes = sorted(
        [(r.sent_s, 1) for r in measured(result) if r.sent_s is not None]
        + [
            (r.last_s, -1)
            for r in measured(result)
            if r.sent_s is not None and r.last_s is not None
        ]
    )
    samples = result.samples
    drawn, axes = figure(2 if samples else 1, 1, height=4.6 if samples else 2.8, sharex=True)
    times = [0.0, *(at for at, _ in changes)]
    axes[0].step(times, np.cumsum([0, *(by for _, by in changes)]), where="post", color=BLUE)
    axes[0].set_ylim(bottom=0)
    label(axes[0], "" if samples else _TIME, "requests in flight")
    caption = "Requests sent and not yet answered"
    if not samples:
        caption += ". Replicas are not known: the target is not a platform of this machine."
        return Plot("In flight and replicas", caption, drawn)
    at = np.array([sample.at_s for sample in samples])
    names = list(dict.fromkeys(f.name for sample in samples for f in sample.functions))
    by_name = [{f.name: f for f in sample.functions} for sample in samples]
    kinds = {
        "expert functions": [name for name in names if "expert" in name],
        "other functions": [name for name in names if "expert" not in name],
    }
    stacks, labels = [], []
    for words, members in kinds.items():
        for state in ("ready", "starting"):
            counts = [
                sum(getattr(now[name], state) for name in members if name in now) for now in by_name
            ]
            stacks.append(counts)
            labels.append(f"{words}, {state}")
    order = (2, 0, 3, 1)  # what is always there at the bottom, what is starting on top
    axes[1].stackplot(
        at,
        [stacks[i] for i in order],
        labels=[labels[i] for i in order],
        colors=[GREY, COLOURS[0], COLOURS[5], ORANGE],
        step="post",
        linewidth=0,
    )
    legend(axes[1], loc="upper left", ncols=2)
    axes[1].set_ylim(0, 1.35 * max(1, *(sum(column) for column in zip(*stacks, strict=True))))
    label(axes[1], _TIME, "replicas")
    return Plot(
        "In flight and replicas",
        f"{caption}, and the replicas behind them, {len(samples)} samples.",
        drawn,
    )
