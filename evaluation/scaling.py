"""Thousands of experts: what a fleet of expert functions costs at each rate, and planning it.

DeepSeek-V3's 61 layers of 256 experts, from a request in minutes to thousands a second, cut into
functions of different sizes, against the cheapest deployment that is always on. The paper argues
that a function for each expert does not scale; here it is simulated.
"""

from __future__ import annotations

import time

import numpy as np

from evaluation.fleet import AlwaysOn, Fleet, FleetFigures, always_on, simulate_fleet
from evaluation.hosts import DEFAULT_HOST, Host, load_host
from evaluation.results import Cell, Comparison, Picture, Series, TableResult
from evaluation.shapes import SHAPES, Shape
from evaluation.workbench import Workbench
from loadgen.plots.style import COLOURS, GREY, figure, label, legend
from planner.optimise.as_built import Demand
from planner.optimise.whole_plan import WholePlanner
from remoe.prices import DEFAULT_PRICES

__all__ = ["make"]

_RATES = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)
_CUTS = (1, 16, 64, 256)
_PLANS = 7


def make(bench: Workbench) -> TableResult:
    host, shape = load_host(bench.options.host or DEFAULT_HOST), SHAPES["61 x 256"]
    fleets = _fleets(bench, host, shape)
    planning = _planning(bench, host)
    return TableResult(
        comparisons=[*_of_fleets(fleets), *_of_planning(planning)],
        series=[fleets, planning],
        pictures=[_picture(fleets)],
        notes=[
            f"Simulated on {host.name}. Measured: {'; '.join(host.measured)}.",
            (
                f"Assumed: {'; '.join(host.assumed)}; whole GPU cards of 80 GB, at 3 times the CPU's "
                "price for a GB; 1 vCPU with each GB, 1 GB at least; functions sleep 60 s after "
                "their last call; at most 70 % busy; streams share a step as long as it takes 0.5 s."
            ),
            "Requests are the means of Azure's conversation hour: 1,155 tokens read, 211 written.",
        ],
    )


def _fleets(bench: Workbench, host: Host, shape: Shape) -> Series:
    rates = _RATES[::4] if bench.options.quick else _RATES
    cuts = _CUTS[1:3] if bench.options.quick else _CUTS
    requests = 60 if bench.options.quick else 400
    rows: list[list[Cell]] = []
    for rate in rates:
        resident = bench.item(
            f"always on at {rate:g} a second",
            {"host": host, "shape": shape, "fleet": repr(Fleet(experts_per_function=1))},
            lambda at=rate: always_on(host, shape, Fleet(experts_per_function=1), at),  # type: ignore[misc]
            AlwaysOn,
        )
        for cut in cuts:
            fleet = Fleet(
                experts_per_function=cut, cpu_usd_per_gb_s=DEFAULT_PRICES.cpu_usd_per_gb_s
            )
            figures = bench.item(
                f"{cut} experts a function at {rate:g} a second",
                {"host": host, "shape": shape, "fleet": repr(fleet), "requests": requests},
                lambda of=fleet, at=rate: simulate_fleet(  # type: ignore[misc]
                    host, shape, of, at, requests=requests
                ),
                FleetFigures,
            )
            rows.append(
                [
                    rate,
                    cut,
                    figures.functions,
                    figures.awake,
                    figures.replicas,
                    figures.main_replicas,
                    1e3 * figures.tpot_s,
                    figures.usd_per_million_tokens,
                    resident.usd_per_million_tokens,
                    resident.experts_on,
                    resident.replicas,
                    1e3 * resident.tpot_s,
                ]
            )
    return Series(
        name="fleets",
        columns=[
            "requests_per_s",
            "experts_a_function",
            "functions",
            "awake",
            "replicas",
            "main_replicas",
            "tpot_ms",
            "usd_per_million_tokens",
            "always_on_usd_per_million_tokens",
            "always_on_experts",
            "always_on_replicas",
            "always_on_tpot_ms",
        ],
        rows=rows,
    )


def _planning(bench: Workbench, host: Host) -> Series:
    rows: list[list[Cell]] = []
    for name in ("OLMoE-1B-7B", "DeepSeek-V2-Lite", "61 x 256"):
        shape = SHAPES[name]
        took = bench.item(
            f"planning {name}",
            {"host": host, "shape": shape, "plans": _PLANS},
            lambda of=shape: _plan_s(host, of),  # type: ignore[misc]
            list[float],
        )
        rows.append([name, shape.moe_layers * shape.experts, 1e3 * took[0], 1e3 * took[1]])
    return Series(name="planning", columns=["model", "experts", "wall_ms", "cpu_ms"], rows=rows)


def _plan_s(host: Host, shape: Shape) -> list[float]:
    """Median wall and CPU seconds of a whole plan."""
    system = host.system(
        shape, cpu_usd_per_gb_s=DEFAULT_PRICES.cpu_usd_per_gb_s, gpu_price_ratio=3.0
    )
    chance = np.random.default_rng(0)
    wall, cpu = [], []
    for _ in range(_PLANS):
        prefill, decode = chance.dirichlet(np.full(shape.experts, 0.5), (2, shape.moe_layers))
        before = time.perf_counter(), time.thread_time()
        WholePlanner(system, Demand(prefill, decode, 125.0, 200.0)).plan("cost")
        wall.append(time.perf_counter() - before[0])
        cpu.append(time.thread_time() - before[1])
    return [float(np.median(wall)), float(np.median(cpu))]


def _of_fleets(fleets: Series) -> list[Comparison]:
    rows = fleets.named()
    best: dict[float, dict[str, Cell]] = {}
    for row in rows:
        rate = float(row["requests_per_s"] or 0)
        usd = float(row["usd_per_million_tokens"] or 0)
        if rate not in best or usd < float(best[rate]["usd_per_million_tokens"] or 0):
            best[rate] = row

    def saving(row: dict[str, Cell]) -> float:
        always = float(row["always_on_usd_per_million_tokens"] or 0)
        return 1 - float(row["usd_per_million_tokens"] or 0) / always

    cheaper = [rate for rate, row in best.items() if saving(row) > 0]
    finest = max(float(row["functions"] or 0) for row in rows)
    said = ", ".join(
        f"{rate:g}/s {saving(row):+.0%} ({row['experts_a_function']} experts a function)"
        for rate, row in best.items()
    )
    return [
        Comparison(
            what="saved against the cheapest always-on deployment, by rate",
            paper=None,
            ours=said,
            same_setting=False,
            gap=f"functions win up to {max(cheaper):g} requests/s"
            if cheaper
            else "functions never win with these figures",
        ),
        Comparison(
            what="a function for each expert",
            paper="does not scale (61 layers of 256 experts)",
            ours=f"{finest:,.0f} functions; "
            + ", ".join(
                f"{row['requests_per_s']:g}/s {float(row['awake'] or 0):,.0f} awake"
                for row in rows
                if row["functions"] == finest
            ),
            same_setting=False,
            gap="simulated: the paper argues without figures",
        ),
    ]


def _of_planning(planning: Series) -> list[Comparison]:
    return [
        Comparison(
            what="time to plan a request",
            paper="negligible, adds no waiting (CALCULATE)",
            ours=", ".join(
                f"{row['model']} {float(row['cpu_ms'] or 0):.0f} ms of CPU"
                for row in planning.named()
            ),
            same_setting=False,
            gap="measured with the planner's own optimiser, 41 specs a function, no SLO",
        )
    ]


def _picture(fleets: Series) -> Picture:
    drawn, axes = figure(1, 2, height=3.4)
    cuts = list(dict.fromkeys(fleets.column("experts_a_function")))
    rates = list(dict.fromkeys(fleets.numbers("requests_per_s").tolist()))
    rows = fleets.named()
    for colour, cut in zip(COLOURS, cuts, strict=False):
        of = [row for row in rows if row["experts_a_function"] == cut]
        name = f"{cut} expert{'s' * (cut != 1)} a function"
        axes[0].plot(
            rates,
            [float(row["usd_per_million_tokens"] or 0) for row in of],
            "o-",
            markersize=3,
            color=colour,
            label=name,
        )
        axes[1].plot(
            rates,
            [float(row["replicas"] or 0) for row in of],
            "o-",
            markersize=3,
            color=colour,
            label=name,
        )
    always = [row for row in rows if row["experts_a_function"] == cuts[0]]
    axes[0].plot(
        rates,
        [float(row["always_on_usd_per_million_tokens"] or 0) for row in always],
        "--",
        color=GREY,
        label="cheapest always on",
    )
    for at in axes:
        at.set(xscale="log", yscale="log")
    label(axes[0], "requests a second", "USD for a million tokens", "Cost")
    label(axes[1], "requests a second", "expert functions awake, replicas", "Functions")
    legend(axes[0])
    return Picture(
        "scaling",
        "61 layers of 256 experts: cost and functions by rate, for functions of different sizes.",
        drawn,
    )
