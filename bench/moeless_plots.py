"""The plots of bench/moeless.py: accuracy by layer, layer times, and gain against skew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from bench.moeless_tables import heading, mean_s, table
from loadgen.plots.style import BLUE, GREEN, GREY, ORANGE, RED, figure, label, legend, logarithmic
from planner.moeless.simulation import Outcome
from planner.moeless.token_routes import synthetic_routes
from planner.moeless.traffic import make_batches
from planner.moeless.world import World
from remoe.moeless.gates import GateCopies

Arrivals = Sequence[tuple[float, int, int]]
ZIPFS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def draw_predictor(copies: GateCopies) -> Figure:
    drawn, axes = figure(1, 1, height=2.8)
    for distance, colour in zip((1, 3, 5), (BLUE, ORANGE, GREEN), strict=True):
        rows = [row for row in copies.facts.quality if row.distance == distance]
        layers = [row.layer for row in rows]
        axes[0].plot(layers, [row.overlap for row in rows], color=colour, label=f"d = {distance}")
        axes[0].plot(
            layers, [row.plain_overlap for row in rows], color=colour, linestyle=":", linewidth=1.2
        )
    axes[0].axhline(copies.facts.threshold, color=GREY, linewidth=0.8)
    label(axes[0], "layer", "top-k overlap", "Gate copies: kept (solid) and plain (dotted)")
    legend(axes[0], loc="lower right")
    return drawn


def draw_cdf(outcomes: dict[str, Outcome], title: str) -> Figure:
    drawn, axes = figure(1, 2, height=2.8)
    colours = (GREY, ORANGE, GREEN, BLUE, RED)
    for axis, prefill in zip(axes, (True, False), strict=True):
        for (name, outcome), colour in zip(outcomes.items(), colours, strict=False):
            chosen = outcome.prefill == prefill
            order = np.argsort(outcome.paper_s[chosen])
            weight = outcome.weight[chosen][order]
            axis.step(
                1e6 * outcome.paper_s[chosen][order],
                np.cumsum(weight) / weight.sum(),
                color=colour,
                label=name,
            )
        logarithmic(axis, "x")
        label(
            axis, "MoE layer, µs", "share of layers and steps", "prefill" if prefill else "decode"
        )
    axes[0].set_title(f"{title}: prefill", fontsize=9.5, loc="left")
    legend(axes[1], loc="lower right")
    return drawn


def skew_curve(world: World, arrivals: Arrivals) -> Figure:
    heading("Against skew: synthetic routing, Zipf popularity in each layer")
    found: list[tuple[float, float, float, float, float]] = []
    for zipf in ZIPFS:
        tokens = synthetic_routes(
            layers=8, experts=world.tokens.experts, top_k=2, zipf=zipf, topical=0.3
        )
        synthetic = World(
            tokens,
            tokens.mean_loads(),
            make_batches(arrivals, range(len(tokens.topics))),
            world.setting,
            world.stride,
        )
        plain, eplb, _ = (synthetic.run(policy) for policy in synthetic.baselines())
        ours = synthetic.run(synthetic.moeless())
        worst, _ = synthetic.skew()
        found.append(
            (
                zipf,
                worst,
                mean_s(ours) / mean_s(plain) - 1,
                mean_s(ours) / mean_s(eplb) - 1,
                mean_s(eplb) / mean_s(plain) - 1,
            )
        )
    table(
        ["Zipf exponent", "most loaded / mean", "MoEless against EP", "against EPLB", "EPLB / EP"],
        [[z, f"{w:.2f}", *(f"{100 * x:+.1f} %" for x in rest)] for z, w, *rest in found],
    )
    drawn, axes = figure(1, 1, height=2.8)
    worst = [row[1] for row in found]
    axes[0].plot(worst, [100 * row[2] for row in found], color=BLUE, label="MoEless / EP")
    axes[0].plot(worst, [100 * row[3] for row in found], color=GREEN, label="MoEless / EPLB")
    axes[0].plot(worst, [100 * row[4] for row in found], color=ORANGE, label="EPLB / EP")
    label(axes[0], "most loaded expert / mean, prefill", "layer time, %", "Gain by skew")
    legend(axes[0])
    return drawn
