"""MoEless: every table and plot of docs/moeless.md, in one run.

    remoe profile gates --prompts PROMPT_SETS --keep-recording RECORDING
    python bench/moeless.py --recording RECORDING --azure AzureLLMInferenceTrace_conv.csv --out PLOTS

An expert's time is measured on this machine and a row's way is that through a local socket; flags
give another machine's figures instead. Only prompts that the gate copies did not learn from are
replayed. EPLB begins with the mean loads of the others.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from matplotlib.figure import Figure

from evaluation.moeless_machine import ROWS, expert_seconds, route_seconds
from loadgen.plots.style import BLUE, GREEN, GREY, ORANGE, RED, figure, label, legend, logarithmic
from loadgen.readers.azure_llm import read_azure_trace
from loadgen.trace import Selection
from planner.moeless.hardware import ExpertMachine, fit_line
from planner.moeless.policies import Policy
from planner.moeless.simulation import Outcome, Setting
from planner.moeless.token_routes import (
    TokenRoutes,
    plain_routes,
    predicted_routes,
    recorded_routes,
    synthetic_routes,
)
from planner.moeless.traffic import Batch, make_batches
from planner.moeless.world import World
from remoe.checkpoint import Checkpoint
from remoe.cli.model import built_model
from remoe.moeless.gates import GATES_FOLDER, GateCopies
from remoe.moeless.placer import place
from remoe.moeless.recording import Recording
from remoe.moeless.scaler import scale

Arrivals = Sequence[tuple[float, int, int]]
ZIPFS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 1.0)
KEEP_ALIVES_S = (1.0, 5.0, 20.0, 60.0)
SECTIONS = ("times", "predictor", "compare", "ratios", "ablation", "sweeps", "skew")
RATIOS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)  # beta / alpha


def heading(text: str) -> None:
    print(f"\n## {text}\n", flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print("| " + " | ".join(columns) + " |")
    print("|---" + "|--:" * (len(columns) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def less(ours: float, theirs: float) -> str:
    """How far ours is below theirs, in per cent."""
    return f"{100 * (ours / theirs - 1):+.1f} %"


# The machine


def measured_machine(options: argparse.Namespace, checkpoint: Checkpoint) -> ExpertMachine:
    heading("An expert's time by rows")
    seconds = expert_seconds(checkpoint)
    start_s, row_s = fit_line(np.array(ROWS, np.float64), seconds)
    print(f"{platform.processor() or platform.machine()}, one thread, least of repeats\n")
    table(
        ["rows", *map(str, ROWS)],
        [
            ["measured, µs", *(f"{1e6 * s:.0f}" for s in seconds)],
            ["start + alpha · rows, µs", *(f"{1e6 * (start_s + row_s * r):.0f}" for r in ROWS)],
        ],
    )
    route_s = route_seconds(2 * checkpoint.hidden_size)
    machine = ExpertMachine(
        row_s=row_s if options.row_us is None else options.row_us * 1e-6,
        start_s=start_s if options.start_us is None else options.start_us * 1e-6,
        route_s=route_s if options.route_us is None else options.route_us * 1e-6,
        expert_bytes=(
            checkpoint.expert_size_bytes if options.expert_mb is None else options.expert_mb * 1e6
        ),
        misc_s=options.misc_us * 1e-6,
        misc_bytes=options.misc_mb * 1e6,
        attach_bytes_per_s=options.attach_gb_s * 1e9,
    )
    print(
        f"\nused: alpha {1e6 * machine.row_s:.2f} µs, beta {1e6 * machine.route_s:.3f} µs, "
        f"start {1e6 * machine.start_s:.0f} µs, expert {machine.expert_bytes / 1e6:.1f} MB "
        f"attached in {1e3 * machine.attach_s:.2f} ms"
    )
    return machine


# The predictor


def predictor_tables(copies: GateCopies) -> None:
    heading("Load prediction, held-out prompts")
    facts = copies.facts
    print(
        f"{facts.train_tokens:,} tokens to learn from, {facts.test_tokens:,} of other prompts to "
        f"measure; h = {facts.threshold}. Means over layers.\n"
    )
    rows = []
    for distance in facts.distances:
        of = [row for row in facts.quality if row.distance == distance]
        weak = [row for row in of if row.plain_overlap < facts.threshold]
        gains = [row.overlap - row.plain_overlap for row in weak]
        means = [
            np.mean([getattr(row, name) for row in of])
            for name in (
                "plain_overlap",
                "overlap",
                "plain_pearson",
                "pearson",
                "plain_step_pearson",
                "step_pearson",
            )
        ]
        rows.append(
            [
                distance,
                *(f"{mean:.3f}" for mean in means),
                f"{len(weak)} of {len(of)}",
                f"{100 * np.mean(gains):+.1f}" if gains else "",
                f"{100 * min(gains):+.1f}" if gains else "",
                f"{sum(gain >= 0.1 for gain in gains)}",
            ]
        )
    table(
        [
            "d",
            "overlap, plain",
            "kept",
            "Pearson, prompts, plain",
            "kept",
            "Pearson, steps, plain",
            "kept",
            "layers below h",
            "their gain, points",
            "least gain",
            "gain ≥ 10",
        ],
        rows,
    )


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


# The simulation


def comparison(title: str, world: World, *, ours: dict[str, Policy]) -> dict[str, Outcome]:
    heading(title)
    outcomes = {policy.name: world.run(policy) for policy in world.baselines()}
    outcomes |= {name: world.run(policy) for name, policy in ours.items()}
    plain = outcomes["expert parallel"]
    worst, moved = world.skew()
    print(
        f"{len(world.batches)} batches of {np.mean([len(b.requests) for b in world.batches]):.1f} "
        f"requests, {world.setting.gpus} GPUs. Prefill: the most loaded expert has {worst:.2f} "
        f"times the mean; the Oracle moves {100 * moved:.0f} % of routes.\n"
    )
    base = plain.mean(plain.paper_s)
    table(
        [
            "policy",
            "layer time",
            "against EP",
            "against EPLB",
            "prefill",
            "decode",
            "taking turns",
            "prefill",
            "decode",
            "waiting cold",
            "replicas",
            "CV",
            "cold starts",
        ],
        [
            [
                name,
                f"{1e6 * outcome.mean(outcome.paper_s):.0f} µs",
                less(outcome.mean(outcome.paper_s), base),
                less(outcome.mean(outcome.paper_s), _mean(outcomes["EPLB"])),
                less(
                    outcome.mean(outcome.paper_s, prefill=True),
                    plain.mean(plain.paper_s, prefill=True),
                ),
                less(
                    outcome.mean(outcome.paper_s, prefill=False),
                    plain.mean(plain.paper_s, prefill=False),
                ),
                less(outcome.mean(outcome.serial_s), plain.mean(plain.serial_s)),
                less(
                    outcome.mean(outcome.serial_s, prefill=True),
                    plain.mean(plain.serial_s, prefill=True),
                ),
                less(
                    outcome.mean(outcome.serial_s, prefill=False),
                    plain.mean(plain.serial_s, prefill=False),
                ),
                f"{1e6 * outcome.mean(outcome.stall_s):.1f} µs",
                f"{outcome.mean_replicas:.1f}",
                f"{outcome.mean_cv:.2f}",
                f"{100 * outcome.cold_share:.2f} %",
            ]
            for name, outcome in outcomes.items()
        ],
    )
    print()
    table(
        ["policy", "paper's proxy", "executing layer only", "resident, keep-alive included"],
        [
            [
                name,
                less(outcome.proxy, plain.proxy),
                less(outcome.executing, plain.executing),
                less(outcome.resident, plain.resident),
            ]
            for name, outcome in outcomes.items()
        ],
    )
    return outcomes


def _mean(outcome: Outcome) -> float:
    return outcome.mean(outcome.paper_s)


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


def parts(world: World) -> None:
    heading("Ablation: each part taken out alone")
    whole = world.run(world.moeless())
    plain = world.run(world.baselines()[0])
    rows: list[tuple[str, dict[str, object]]] = [
        ("MoEless", {}),
        ("without the predictor", {"predictor": False}),
        ("without the scaler", {"scaler": False}),
        ("without the placer", {"placer": False}),
        ("without all three", {"predictor": False, "scaler": False, "placer": False}),
        ("with a guard on warm places (ours)", {"warm_slack": 0.2}),
        ("with 2 routes of history (ours)", {"prior_routes": 2.0}),
        ("with 8 routes of history (ours)", {"prior_routes": 8.0}),
        ("with experts at zero (ours)", {"scale_to_zero": True}),
    ]
    printed = []
    for name, changes in rows:
        outcome = world.run(world.moeless(**changes)) if changes else whole
        printed.append(
            [
                name,
                f"{1e6 * _mean(outcome):.0f} µs",
                less(_mean(outcome), _mean(whole)),
                less(_mean(outcome), _mean(plain)),
                f"{outcome.mean_replicas:.1f}",
                f"{outcome.mean_cv:.2f}",
                f"{100 * outcome.cold_share:.2f} %",
                less(outcome.resident, whole.resident),
            ]
        )
    table(
        [
            "",
            "layer time",
            "against whole",
            "against EP",
            "replicas",
            "CV",
            "cold starts",
            "resident",
        ],
        printed,
    )


def sweeps(world: World, plain_tokens: TokenRoutes) -> None:
    plain = world.run(world.baselines()[0])

    def row(name: object, outcome: Outcome) -> list[object]:
        return [
            name,
            f"{1e6 * _mean(outcome):.0f} µs",
            less(_mean(outcome), _mean(plain)),
            f"{outcome.mean_replicas:.1f}",
            f"{outcome.mean_cv:.2f}",
            f"{1e6 * outcome.mean(outcome.stall_s):.1f} µs",
            f"{100 * outcome.cold_share:.2f} %",
            less(outcome.resident, plain.resident),
        ]

    columns = ["layer time", "against EP", "replicas", "CV", "waiting cold", "cold", "resident"]
    heading("Distance d")
    unlearned = replace(world, tokens=plain_tokens)
    printed = []
    for distance in sorted(world.tokens.predicted):
        setting = replace(world.setting, distance=distance)
        for name, of in (("kept copies", world), ("plain copies", unlearned)):
            printed.append(row(f"{distance}, {name}", of.run(of.moeless(), setting)))
    table(["d", *columns], printed)
    heading("Threshold V")
    runs = [(v, world.run(world.moeless(cv_threshold=v))) for v in THRESHOLDS]
    table(["V", *columns], [row(v, outcome) for v, outcome in runs])
    heading("Keep-alive")
    alive = [(s, replace(world.setting, keep_alive_s=s)) for s in KEEP_ALIVES_S]
    table(
        ["keep-alive, s", *columns],
        [row(seconds, world.run(world.moeless(), setting)) for seconds, setting in alive],
    )


def ratios(world: World) -> None:
    heading("Any machine: beta over alpha")
    rows = []
    for ratio in RATIOS:
        machine = replace(world.setting.machine, route_s=ratio * world.setting.machine.row_s)
        setting = replace(world.setting, machine=machine)
        plain, eplb, oracle = (_mean(world.run(policy, setting)) for policy in world.baselines())
        ours, guarded = (
            _mean(world.run(world.moeless(**changes), setting))
            for changes in ({}, {"warm_slack": 0.2})
        )
        without = _mean(world.run(world.moeless(placer=False), setting))
        rows.append(
            [
                ratio,
                less(ours, plain),
                less(ours, eplb),
                less(oracle, plain),
                less(guarded, plain),
                less(without, plain),
            ]
        )
    table(
        [
            "beta / alpha",
            "MoEless against EP",
            "against EPLB",
            "Oracle against EP",
            "guarded against EP",
            "no placer against EP",
        ],
        rows,
    )


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
                _mean(ours) / _mean(plain) - 1,
                _mean(ours) / _mean(eplb) - 1,
                _mean(eplb) / _mean(plain) - 1,
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


def algorithm_times() -> None:
    heading("Scaler and placer, 256 experts x 61 layers")
    random = np.random.default_rng(0)
    rows = []
    for gpus in (8, 64):
        timed: dict[str, list[float]] = {"scaler": [], "placer": []}
        for _ in range(61):
            loads = random.dirichlet(np.full(256, 0.5)) * 4096
            start = time.perf_counter()
            replicas = scale(loads, most_added=256)
            timed["scaler"].append(time.perf_counter() - start)
            warm = place(loads, replicas, gpus)
            start = time.perf_counter()
            place(loads, replicas, gpus, warm=warm, room=[-(-512 // gpus)] * gpus)
            timed["placer"].append(time.perf_counter() - start)
        scaler, placer = (1e3 * float(np.median(times)) for times in timed.values())
        rows.append([gpus, f"{scaler:.2f}", f"{placer:.2f}", f"{scaler + placer:.2f}"])
    table(["GPUs", "scaler, ms a layer", "placer", "both (medians)"], rows)


def topics_in_turn(
    arrivals: Arrivals, tokens: TokenRoutes, *, turn_s: float, seed: int = 0
) -> list[Batch]:
    """Batches whose prompts are all of one set, another set each `turn_s`."""
    sets = sorted({topic.split("/", 1)[0] for topic in tokens.topics})
    random = np.random.default_rng(seed)
    random.shuffle(sets)
    batches = []
    turn: Callable[[tuple[float, int, int]], int] = lambda arrival: int(arrival[0] // turn_s)  # noqa: E731
    for number, own in itertools.groupby(arrivals, turn):
        chosen = sets[number % len(sets)]
        prompts = [
            prompt for prompt, topic in enumerate(tokens.topics) if topic.split("/", 1)[0] == chosen
        ]
        batches += make_batches(list(own), prompts, seed=seed + number)
    return batches


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recording", type=Path, required=True)
    parser.add_argument("--azure", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path)
    parser.add_argument("--gates", type=Path, help="default: in the model's folder")
    parser.add_argument("--out", type=Path, help="write the plots here, as SVG")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--start-s", type=float, default=600.0, help="where the trace begins")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the trace")
    parser.add_argument(
        "--stride", type=int, default=32, help="simulate every so many decode steps"
    )
    parser.add_argument("--room", type=int, default=4, help="replicas of a layer on a GPU")
    parser.add_argument("--row-us", type=float, help="alpha")
    parser.add_argument("--start-us", type=float)
    parser.add_argument("--route-us", type=float, help="beta")
    parser.add_argument("--expert-mb", type=float)
    parser.add_argument("--misc-us", type=float, default=0.0)
    parser.add_argument("--misc-mb", type=float, default=0.0)
    parser.add_argument("--attach-gb-s", type=float, default=5.0)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    return parser.parse_args()


def compare(worlds: dict[str, World], plots: dict[str, Figure]) -> None:
    for name, world in worlds.items():
        machine = world.setting.machine
        ours: dict[str, Policy] = {
            "MoEless": world.moeless(),
            "split above start / alpha (ours)": world.moeless(
                split_above=machine.start_s / machine.row_s
            ),
        }
        outcomes = comparison(f"Real routing, {name}", world, ours=ours)
        plots[f"moeless-cdf-{name.split()[0]}"] = draw_cdf(outcomes, name)


def main() -> None:
    options = parse_options()

    model_dir = options.model_dir or built_model()
    checkpoint = Checkpoint.open(model_dir)
    copies = GateCopies.read(
        options.gates or model_dir / GATES_FOLDER, model_digest=checkpoint.digest
    )
    recording = Recording.read(options.recording)
    window = Selection(start_s=options.start_s, end_s=options.start_s + options.seconds)
    arrivals = [
        (request.arrival_s, request.prompt_tokens or 1, request.output_tokens or 1)
        for request in window.apply(read_azure_trace(options.azure))
    ]
    wanted = options.only
    if "times" in wanted:
        algorithm_times()
    machine = measured_machine(options, checkpoint)
    plots: dict[str, Figure] = {}
    if "predictor" in wanted:
        predictor_tables(copies)
        plots["moeless-predictor"] = draw_predictor(copies)

    held_out = recording.held_out()
    everything = recorded_routes(recording, predicted_routes(recording, copies))
    tokens = everything.only(held_out)
    mixed = World(
        tokens,
        everything.only(~held_out).mean_loads(),
        make_batches(arrivals, range(len(tokens.topics))),
        Setting(machine=machine, gpus=options.gpus, room=options.room),
        options.stride,
    )
    topical = replace(mixed, batches=topics_in_turn(arrivals, tokens, turn_s=10.0))
    if "compare" in wanted:
        compare({"mixed prompts": mixed, "one prompt set at a time": topical}, plots)
    if "ratios" in wanted:
        ratios(topical)
    if "ablation" in wanted:
        parts(topical)
    if "sweeps" in wanted:
        plain = recorded_routes(recording, plain_routes(recording, copies.facts.distances))
        sweeps(topical, plain.only(held_out))
    if "skew" in wanted:
        plots["moeless-skew"] = skew_curve(mixed, arrivals)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, drawn in plots.items():
            drawn.savefig(options.out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
