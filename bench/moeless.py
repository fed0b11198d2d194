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
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure

from bench.moeless_plots import Arrivals, draw_cdf, draw_predictor, skew_curve
from bench.moeless_tables import (
    algorithm_times,
    comparison,
    heading,
    parts,
    predictor_tables,
    ratios,
    sweeps,
    table,
)
from evaluation.moeless_machine import ROWS, expert_seconds, route_seconds
from loadgen.readers.azure_llm import read_azure_trace
from loadgen.trace import Selection
from planner.moeless.hardware import ExpertMachine, fit_line
from planner.moeless.policies import Policy
from planner.moeless.simulation import Setting
from planner.moeless.token_routes import (
    TokenRoutes,
    plain_routes,
    predicted_routes,
    recorded_routes,
)
from planner.moeless.traffic import Batch, make_batches
from planner.moeless.world import World
from remoe.checkpoint import Checkpoint
from remoe.cli.model import built_model
from remoe.moeless.gates import GATES_FOLDER, GateCopies
from remoe.moeless.recording import Recording

SECTIONS = ("times", "predictor", "compare", "ratios", "ablation", "sweeps", "skew")


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
