"""The tables of bench/moeless.py: predictor, policies, costs, ablation, sweeps, the algorithms' time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from planner.moeless.policies import Policy
from planner.moeless.simulation import Outcome
from planner.moeless.token_routes import TokenRoutes
from planner.moeless.world import World
from remoe.moeless.gates import GateCopies
from remoe.moeless.placer import place
from remoe.moeless.scaler import scale

THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 1.0)
KEEP_ALIVES_S = (1.0, 5.0, 20.0, 60.0)
RATIOS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)  # beta / alpha
BASELINES = ("expert parallel", "EPLB", "oracle (lossy)")
PAPERS_COSTS = ("-92.68 %", "-95.11 %", "-84.06 %")


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


def mean_s(outcome: Outcome) -> float:
    """Mean layer time by the paper's formula."""
    return outcome.mean(outcome.paper_s)


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
                less(outcome.mean(outcome.paper_s), mean_s(outcomes["EPLB"])),
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
    costs(outcomes)
    return outcomes


def costs(outcomes: dict[str, Outcome]) -> None:
    """Every policy against expert parallelism, and MoEless against each of the others."""
    kinds = {"proxy": "paper's proxy", "executing": "executing layer only", "resident": "resident"}
    print()
    table(
        ["against expert parallelism", *kinds.values()],
        [
            [
                name,
                *(
                    less(getattr(outcome, kind), getattr(outcomes["expert parallel"], kind))
                    for kind in kinds
                ),
            ]
            for name, outcome in outcomes.items()
        ],
    )
    print()
    table(
        ["MoEless against", *BASELINES],
        [
            ["the paper's MoEless, its proxy", *PAPERS_COSTS],
            *(
                [
                    said,
                    *(
                        less(getattr(outcomes["MoEless"], kind), getattr(outcomes[other], kind))
                        for other in BASELINES
                    ),
                ]
                for kind, said in kinds.items()
            ),
        ],
    )


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
                f"{1e6 * mean_s(outcome):.0f} µs",
                less(mean_s(outcome), mean_s(whole)),
                less(mean_s(outcome), mean_s(plain)),
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
            f"{1e6 * mean_s(outcome):.0f} µs",
            less(mean_s(outcome), mean_s(plain)),
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
        plain, eplb, oracle = (mean_s(world.run(policy, setting)) for policy in world.baselines())
        ours, guarded = (
            mean_s(world.run(world.moeless(**changes), setting))
            for changes in ({}, {"warm_slack": 0.2})
        )
        without = mean_s(world.run(world.moeless(placer=False), setting))
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
