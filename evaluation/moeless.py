"""MoEless' experiments: layer time and cost by policy, predictor, distances, thresholds, ablation.

Real routing of the model under test, replayed in the simulator on eight GPUs (papers.md B.2).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import msgspec
import numpy as np

from evaluation.moeless_world import GPUS, learned, simulated_world
from evaluation.results import Cell, Comparison, Picture, Series, TableResult
from evaluation.workbench import Workbench
from loadgen.plots.style import BLUE, GREEN, GREY, ORANGE, RED, figure, label, legend, logarithmic
from planner.moeless.policies import Policy
from planner.moeless.simulation import Outcome, Setting
from planner.moeless.token_routes import plain_routes, recorded_routes
from planner.moeless.world import World
from remoe.moeless.gates import GateCopies
from remoe.moeless.placer import place
from remoe.moeless.scaler import scale

__all__ = ["make"]

_DISTANCES = (1, 2, 3, 4, 5)
_THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 1.0)
_PARTS: dict[str, dict[str, object]] = {
    "whole": {},
    "without the predictor": {"predictor": False},
    "without the scaler": {"scaler": False},
    "without the placer": {"placer": False},
    "without all three": {"predictor": False, "scaler": False, "placer": False},
}
_QUANTILES = tuple(range(0, 101, 5))


class Replayed(msgspec.Struct, frozen=True):
    """One policy's outcome; `quantiles_us` are layer times at each of `_QUANTILES` percent."""

    name: str
    layer_us: float
    prefill_us: float
    decode_us: float
    proxy: float
    executing: float
    resident: float
    replicas: float
    cv: float
    cold_share: float
    quantiles_us: list[float]


def make(bench: Workbench) -> TableResult:
    distances = _DISTANCES[:1] if bench.options.quick else _DISTANCES
    copies, recording = learned(bench, distances)
    world = simulated_world(bench, copies, recording)
    inputs = {"gates": copies.facts, "machine": repr(world.setting), "batches": len(world.batches)}

    def replayed(name: str, runs: Iterable[tuple[str, World, Policy, Setting]]) -> list[Replayed]:
        return bench.item(
            name,
            inputs,
            lambda: [_figures(who, at.run(policy, how)) for who, at, policy, how in runs],
            list[Replayed],
        )

    usual = world.setting
    policies = {policy.name: policy for policy in [*world.baselines(), world.moeless()]}
    main = replayed("policies", ((n, world, policy, usual) for n, policy in policies.items()))
    parts = replayed("ablation", ((n, world, world.moeless(**c), usual) for n, c in _PARTS.items()))
    plain = recorded_routes(recording, plain_routes(recording, list(distances)))
    unlearned = replace(world, tokens=plain.only(recording.held_out()))
    sweep = replayed(
        "distances",
        (
            (f"{distance}, {kind}", of, of.moeless(), replace(usual, distance=distance))
            for distance in distances
            for kind, of in (("kept copies", world), ("plain copies", unlearned))
        ),
    )
    thresholds = replayed(
        "thresholds",
        ((f"{v:g}", world, world.moeless(cv_threshold=v), usual) for v in _THRESHOLDS),
    )
    overhead_ms = bench.item("scaler and placer", {"gpus": GPUS}, _overhead_ms, float)
    return TableResult(
        comparisons=_compared(main, copies, overhead_ms),
        series=[
            _series("policies", main),
            _accuracy(copies),
            _series("distances", sweep),
            _series("thresholds", thresholds),
            _series("ablation", parts),
        ],
        pictures=[_picture(main)],
        notes=[
            f"Simulated on {GPUS} GPUs: {usual.machine}.",
            (
                "Layer times are the paper's formula, in which replicas of one GPU compute side by "
                "side; docs/moeless.md has them taking turns."
            ),
            (
                f"{copies.facts.train_tokens:,} tokens to learn from, {copies.facts.test_tokens:,} of "
                "other prompts replayed. Costs are against expert parallelism."
            ),
        ],
    )


def _figures(name: str, outcome: Outcome) -> Replayed:
    order = np.argsort(outcome.paper_s)
    share = np.cumsum(outcome.weight[order]) / outcome.weight.sum()
    at = np.searchsorted(share, np.array(_QUANTILES) / 100).clip(max=len(order) - 1)
    return Replayed(
        name=name,
        layer_us=1e6 * outcome.mean(outcome.paper_s),
        prefill_us=1e6 * outcome.mean(outcome.paper_s, prefill=True),
        decode_us=1e6 * outcome.mean(outcome.paper_s, prefill=False),
        proxy=outcome.proxy,
        executing=outcome.executing,
        resident=outcome.resident,
        replicas=outcome.mean_replicas,
        cv=outcome.mean_cv,
        cold_share=outcome.cold_share,
        quantiles_us=(1e6 * outcome.paper_s[order][at]).tolist(),
    )


def _overhead_ms() -> float:
    """Median time of scaler and placer for a layer of 256 experts."""
    random = np.random.default_rng(0)
    took = []
    for _ in range(61):
        loads = random.zipf(1.5, 256).clip(max=10_000).astype(np.float64)
        start = time.perf_counter()
        replicas = scale(loads, cv_threshold=0.2, most_added=256)
        place(loads, replicas, GPUS, room=[-(-512 // GPUS)] * GPUS)
        took.append(time.perf_counter() - start)
    return 1e3 * float(np.median(took))


def _series(name: str, rows: list[Replayed]) -> Series:
    columns = [field for field in Replayed.__struct_fields__ if field != "quantiles_us"]
    cells: list[list[Cell]] = [[getattr(row, column) for column in columns] for row in rows]
    return Series(name=name, columns=columns, rows=cells)


def _accuracy(copies: GateCopies) -> Series:
    columns = ["layer", "distance", "plain_overlap", "overlap", "plain_pearson", "pearson"]
    rows: list[list[Cell]] = [
        [getattr(quality, column) for column in columns] for quality in copies.facts.quality
    ]
    return Series(name="predictor", columns=columns, rows=rows)


def _compared(main: list[Replayed], copies: GateCopies, overhead_ms: float) -> list[Comparison]:
    plain, eplb, oracle, ours = main
    gains = [row.overlap - row.plain_overlap for row in copies.facts.quality]

    other = "another model and machine, simulated; the same formula and batches of the same trace"
    return [
        Comparison(what=what, paper=paper, ours=value, same_setting=False, gap=gap)
        for what, paper, value, gap in (
            (
                "mean layer time against expert parallelism",
                "-43.19 %",
                _change(ours.layer_us, plain.layer_us),
                other,
            ),
            (
                "mean layer time against EPLB",
                "-21.89 %",
                _change(ours.layer_us, eplb.layer_us),
                other,
            ),
            *_costs(ours, {"expert parallelism": plain, "EPLB": eplb, "the Oracle": oracle}),
            (
                "the best layer's gain over plain gate reuse",
                "up to 18 points",
                f"{100 * max(gains):.0f} points",
                "the paper's is a mean over layers of other models",
            ),
            (
                "scaler and placer, a layer of 256 experts",
                None,
                f"{overhead_ms:.2f} ms",
                "not in the paper",
            ),
        )
    ]


def _costs(
    ours: Replayed, others: dict[str, Replayed]
) -> Iterator[tuple[str, str | None, str, str]]:
    """MoEless against each of the paper's baselines: what, the paper's, ours, and the difference."""
    papers = {
        "expert parallelism": "-92.68 %",
        "EPLB": "-95.11 %",
        "the Oracle": "-84.06 %",
    }
    kinds = (
        (
            "cost by the paper's proxy",
            "proxy",
            "a layer that does not run costs the paper's MoEless nothing, and all others all layers",
        ),
        ("cost if all pay for the layer that runs", "executing", "not in the paper"),
        (
            "memory held with keep-alive",
            "resident",
            "not in the paper: replicas kept warm are held too",
        ),
    )
    for what, field, gap in kinds:
        for name, other in others.items():
            paper = papers[name] if field == "proxy" else None
            change = _change(getattr(ours, field), getattr(other, field))
            yield f"{what}, against {name}", paper, change, gap


def _change(now: float, before: float) -> str:
    return f"{100 * (now / before - 1):+.1f} %"


def _picture(main: list[Replayed]) -> Picture:
    drawn, axes = figure(1, 1, height=2.8)
    for row, colour in zip(main, (GREY, ORANGE, GREEN, BLUE, RED), strict=False):
        share = [percent / 100 for percent in _QUANTILES]
        axes[0].step(row.quantiles_us, share, color=colour, label=row.name)
    logarithmic(axes[0], "x")
    # The slowest of all, a layer that waited for an expert, would press the others together.
    axes[0].set_xlim(right=1.5 * max(row.quantiles_us[-2] for row in main))
    label(axes[0], "MoE layer, µs", "share of layers and steps", "Layer time by policy")
    legend(axes[0], loc="lower right")
    return Picture("layer-times", "Distribution of layer times; left is better.", drawn)
