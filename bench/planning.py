"""How good and how fast plans are: every target of the planner's optimisation, in one run.

    python bench/planning.py

Memory against brute force and HiGHS, whole plans against all configurations of tiny models, whole
plans' times, and SLOs under jitter. Ratios and gaps; times are medians of short repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from planner.calibration import Calibration
from planner.config import PlannerSettings
from planner.forecast import Workload
from planner.measurements import Measurements
from planner.memory import MemoryRule
from planner.model import ModelFacts
from planner.optimise.as_built import Demand
from planner.optimise.cost_baselines import baselines
from planner.optimise.exhaustive import best_of_all
from planner.optimise.knapsack import choose
from planner.optimise.milp import choose_by_milp
from planner.optimise.robustness import Uncertainty
from planner.optimise.simulation import Jitter, simulate
from planner.optimise.specs import SpecTable, proportional
from planner.optimise.system import System
from planner.optimise.whole_plan import Limits, RatioRule, WholePlanner
from planner.phases import PhaseProfiles
from planner.plan_making import Optimising
from planner.what_if import WhatIfs
from remoe.experts import ActivationProfile
from remoe.hardware import Spread
from remoe.plan import Slo
from remoe.prices import DEFAULT_PRICES
from remoe.topology import ExpertEndpoint
from tests.planner.optimise.systems import random_demand, random_system
from tests.planner.optimise.test_knapsack import best_by_trying_all, memory_instance
from tests.remoe.hardware_profiles import some_profile


def row(name: str, value: str, target: str) -> None:
    print(f"{name:<66} {value:<40} {target}", flush=True)


def memory_against_brute_force(rng: np.random.Generator, instances: int) -> None:
    gaps, missed = [], 0
    for _ in range(instances):
        problem = memory_instance(
            rng, int(rng.integers(1, 5)), int(rng.integers(2, 13)), rng.uniform(-0.05, 1)
        )
        best, found = best_by_trying_all(*problem), choose(*problem)
        missed += found.feasible != bool(np.isfinite(best))
        if found.feasible:
            gaps.append(found.cost / best - 1)
    row(
        f"memory against brute force, {instances} instances ({len(gaps)} feasible)",
        f"gap mean {np.mean(gaps):.4%} max {np.max(gaps):.4%}, missed {missed}",
        "mean <= 0.05 %, max <= 0.5 %, 0 missed",
    )


def memory_against_milp(rng: np.random.Generator) -> None:
    gaps, ratios = [], []
    for tightness in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        problem = memory_instance(rng, 61, 41, tightness)
        ours = min(_timed(lambda it=problem: choose(*it)) for _ in range(7))
        exact = min(_timed(lambda it=problem: choose_by_milp(*it)) for _ in range(2))
        gaps.append(choose(*problem).cost / choose_by_milp(*problem).cost - 1)
        ratios.append(exact / ours)
    row(
        "memory against MILP (HiGHS through cvxpy), 61 layers x 41 specs",
        f"gap max {max(gaps):.4%}, {min(ratios):.0f} to {max(ratios):.0f} x faster",
        "<= 0.1 %, >= 20 x",
    )


def _timed(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def whole_plans_against_everything(rng: np.random.Generator, instances: int) -> None:
    gaps: dict[RatioRule, list[float]] = {"per-layer": [], "cost": [], "largest": []}
    missed = 0
    for _ in range(instances):
        system = random_system(rng, specs=proportional(np.linspace(0.2, 1.6, 4)), max_replicas=2)
        demand = random_demand(rng, system)
        free = WholePlanner(system, demand)
        (ttft, tpot), loose = free.fastest(), free.plan("cost")
        slack = rng.uniform(0.1, 1.2, 2)
        limits = Limits(
            ttft + slack[0] * max(0.0, loose.limit_ttft_s - ttft) + 1e-9,
            tpot + slack[1] * max(0.0, loose.limit_tpot_s - tpot) + 1e-9,
        )
        planner = WholePlanner(system, demand, limits=limits)
        best = best_of_all(planner)
        if best is None:
            continue
        for rule, found in gaps.items():
            plan = planner.plan(rule)
            if plan.feasible:
                found.append(plan.estimate.cost_usd / best.estimate.cost_usd - 1)
            elif rule == "per-layer":
                missed += 1
    feasible = len(gaps["per-layer"]) + missed
    row(
        f"whole plan against all (b, y, z), {feasible} tiny models",
        f"gap mean {np.mean(gaps['per-layer']):.3%} max {np.max(gaps['per-layer']):.2%}, "
        f"missed {missed}",
        "mean <= 1 %",
    )
    row(
        "  b alike in all layers: cheapest, and the paper's largest",
        f"gap mean {np.mean(gaps['cost']):.2%} and {np.mean(gaps['largest']):.2%}",
        "(compare)",
    )


def time_of_a_plan(rng: np.random.Generator) -> None:
    """With 41 specs to choose from; a deployment that is not asked "what if" has one."""
    for layers, experts, top_k, target in ((30, 8, 2, 15), (61, 256, 8, 60)):
        system = deployed(rng, layers, experts, top_k)
        demand = random_demand(rng, system)
        free = WholePlanner(system, demand)
        (ttft, tpot), loose = free.fastest(), free.plan("cost")
        limits = Limits(
            ttft + 0.7 * max(0.0, loose.limit_ttft_s - ttft) + 1e-6,
            tpot + 0.7 * max(0.0, loose.limit_tpot_s - tpot) + 1e-6,
        )
        slow = system.with_(invocation_s=1.1 * system.invocation_s)
        for name, asked in (("no SLO", Limits()), ("both SLOs bind, robust", limits)):
            took = []
            for _ in range(15):
                before = time.perf_counter(), time.thread_time()
                WholePlanner(system, demand, limits=asked, slow=slow).plan("cost")
                took.append((time.perf_counter() - before[0], time.thread_time() - before[1]))
            row(
                f"optimising a plan, {layers} x {experts}, 41 specs, {name}",
                f"p50 {1e3 * statistics.median(t[0] for t in took):.1f} ms, of them CPU "
                f"{1e3 * statistics.median(t[1] for t in took):.1f}",
                f"<= {target} ms with embedding and search",
            )


def time_of_a_decision(rng: np.random.Generator) -> None:
    """All that the planner does between prediction and reply, as deployed by default."""
    for layers, experts, top_k, target in ((30, 8, 2, 15), (61, 256, 8, 60)):
        model = ModelFacts(
            name="m",
            digest="d",
            layers=layers,
            moe_layers=tuple(range(layers)),
            experts=experts,
            top_k=top_k,
            hidden_size=2048,
            vocab_size=1000,
            context_length=8192,
            expert_size_bytes=5_000_000,
            non_expert_size_bytes=300_000_000,
            kv_bytes_per_token=10_000,
        )
        functions = [
            ExpertEndpoint(
                name=f"f{layer}", url="", first_layer=layer, last_layer=layer, memory_gb=2.0
            )
            for layer in range(layers)
        ]
        memory = MemoryRule(
            model=model, main_runtime_gb=0.7, expert_runtime_gb=0.05, expert_expansion=1.0
        )
        maker = Optimising(model, functions, memory, some_profile(), gpu_speedup=10.0)
        settings = PlannerSettings.model_validate({"REMOE_TOPOLOGY": "unused"})
        what_if = WhatIfs(settings, model, DEFAULT_PRICES, optimising=True).usual
        took = []
        for _ in range(15):
            shares = rng.dirichlet(np.full(experts, 0.5), (2, layers)).astype(np.float32)
            profiles = PhaseProfiles(*(ActivationProfile(of) for of in shares))
            question = what_if.question(
                profiles=profiles,
                workload=Workload(200, 128.0),
                longest_tokens=400,
                slo=Slo(ttft_s=60.0, tpot_s=5.0),
                measured=Measurements(),
                drift=Calibration(0.1).drift,
                asleep=True,
                partition=None,
                main_memory_gb=None,
            )
            before = time.perf_counter(), time.thread_time()
            maker.decide(question)
            took.append((time.perf_counter() - before[0], time.thread_time() - before[1]))
        row(
            f"deciding a plan in the planner, {layers} x {experts}, with an SLO",
            f"p50 {1e3 * statistics.median(t[0] for t in took):.1f} ms, of them CPU "
            f"{1e3 * statistics.median(t[1] for t in took):.1f}",
            f"<= {target} ms with embedding and search",
        )


def deployed(rng: np.random.Generator, layers: int, experts: int, top_k: int) -> System:
    """A main function whose cores do not depend on its memory, as Remoe's do not."""
    system = random_system(
        rng,
        layers=layers,
        experts=experts,
        top_k=top_k,
        specs=proportional(np.linspace(0.2, 4.2, 41)),
        expert_gb=0.005,
        payload_bytes=6e6,
        max_replicas=1,  # as the main function calls
    )
    memory = np.arange(1.0, 1000.0) * 0.1
    return system.with_(main=SpecTable(memory, np.full(len(memory), 4.0), 2.3e-5 * memory))


def slos_under_jitter(rng: np.random.Generator, systems: int) -> None:
    jitter = Jitter()
    attained: dict[str, list[float]] = {"robust": [], "paper": [], "MIX": []}
    premium, infeasible = [], 0
    for _ in range(systems):
        system = random_system(
            rng,
            layers=8,
            experts=8,
            specs=proportional(np.linspace(0.2, 2.2, 11)),
            invocation_s=float(rng.uniform(3e-4, 3e-3)),
            cold_start_s=float(rng.uniform(0.5, 3)),
        )
        drawn = random_demand(rng, system)
        demand = Demand(drawn.prefill, drawn.decode, min(drawn.prompt_tokens, 128.0), 80.0)
        both = jitter.sample(rng, 20_000) * jitter.sample(rng, 20_000)
        uncertain = Uncertainty(
            Spread.of(system.invocation_s * both),
            Spread.of(system.cold_start_s * jitter.sample(rng, 20_000)),
        )
        mix = baselines(system, demand, gpu_speedup=10)[0]
        limits = Limits(1.2 * mix.ttft_s + uncertain.cold_start.p975_s, 1.2 * mix.tpot_s)
        usual = system.with_(
            invocation_s=uncertain.invocation.median_s,
            cold_start_s=uncertain.cold_start.median_s,
        )
        mean, slow = uncertain.expected(system), uncertain.slow(system)
        plans = {
            "robust": WholePlanner(mean, demand, limits=limits, slow=slow).plan("cost"),
            "paper": WholePlanner(usual, demand, limits=limits).plan("largest"),
            "MIX": WholePlanner(mean, demand, most_remote=0).plan(),
        }
        if not plans["robust"].feasible:
            infeasible += 1
            continue
        for name, plan in plans.items():
            outcome = simulate(
                system,
                demand,
                plan,
                rng=rng,
                requests=60,
                call_jitter=jitter,
                request_jitter=jitter,
                cold_jitter=jitter,
                route_noise=0.02,
            )
            attained[name].append(outcome.attained(limits.ttft_s, limits.tpot_s))
        costs = [
            WholePlanner(mean, demand, remote=plan.remote).plan().estimate.cost_usd
            for plan in (plans["robust"], plans["paper"])
        ]
        premium.append(costs[0] / costs[1] - 1)
    row(
        f"SLO attainment, jitter x0.5 to x5, {systems} systems ({infeasible} infeasible)",
        f"robust {np.mean(attained['robust']):.1%}, the paper's {np.mean(attained['paper']):.1%}, "
        f"MIX {np.mean(attained['MIX']):.1%}",
        "robust >= 95 %",
    )
    row("  what the robust plan costs more than the paper's", f"{np.mean(premium):+.1%}", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--instances", type=int, default=600)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    memory_against_brute_force(rng, options.instances)
    memory_against_milp(rng)
    whole_plans_against_everything(rng, options.instances // 15)
    time_of_a_plan(rng)
    time_of_a_decision(rng)
    slos_under_jitter(rng, options.instances // 20)


if __name__ == "__main__":
    main()
