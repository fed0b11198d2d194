from __future__ import annotations

import numpy as np
import pytest

from planner.optimise.cost_baselines import baselines
from planner.optimise.exhaustive import best_of_all
from planner.optimise.paper_model import Configuration, Routes, evaluate_as_printed
from planner.optimise.preallocation import preallocate
from planner.optimise.specs import PLATFORMS, platform_specs, proportional
from planner.optimise.whole_plan import Limits, RatioRule, WholePlan, WholePlanner
from tests.planner.optimise.systems import random_demand, random_system


def between(planner: WholePlanner, free: WholePlan, ttft: float, tpot: float) -> Limits:
    """Limits a share of the way from the fastest there is to what is cheapest."""
    fastest = planner.fastest()
    return Limits(
        fastest[0] + ttft * max(0.0, free.limit_ttft_s - fastest[0]) + 1e-9,
        fastest[1] + tpot * max(0.0, free.limit_tpot_s - fastest[1]) + 1e-9,
    )


def test_against_all_configurations_of_tiny_models() -> None:
    rng = np.random.default_rng(3)
    gaps = []
    for _ in range(8):
        system = random_system(rng, specs=proportional(np.linspace(0.2, 1.6, 3)), max_replicas=2)
        demand = random_demand(rng, system)
        planner = WholePlanner(system, demand)
        limits = between(planner, planner.plan("cost"), *rng.uniform(0.2, 1.2, 2))
        planner = WholePlanner(system, demand, limits=limits)
        best = best_of_all(planner)
        if best is None:
            continue
        found = planner.plan("per-layer")
        assert found.feasible
        gaps.append(found.estimate.cost_usd / best.estimate.cost_usd - 1)
    assert len(gaps) >= 4
    assert np.mean(gaps) <= 0.01
    assert np.min(gaps) >= -1e-9


@pytest.mark.parametrize("seed", range(6))
def test_each_freedom_helps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    system = random_system(rng, layers=6, experts=8)
    demand = random_demand(rng, system)
    cost = {}
    rules: tuple[RatioRule, ...] = ("largest", "cost", "per-layer")
    for rule in rules:
        cost[rule] = WholePlanner(system, demand).plan(rule).estimate.cost_usd
    assert cost["per-layer"] <= cost["cost"] * (1 + 1e-9)
    assert cost["cost"] <= cost["largest"] * (1 + 1e-9)


def test_nothing_remote_is_the_mix_baseline() -> None:
    rng = np.random.default_rng(5)
    system = random_system(rng, layers=3, move_s_per_token=0.0)
    demand = random_demand(rng, system)
    plan = WholePlanner(system, demand, most_remote=0).plan()
    mix = baselines(system, demand, gpu_speedup=10)[0]
    assert plan.counts.tolist() == [0, 0, 0]
    assert plan.estimate.cost_usd == pytest.approx(mix.cost_usd)
    assert (plan.estimate.prefill_s, plan.estimate.tpot_s) == pytest.approx(
        (mix.ttft_s, mix.tpot_s)
    )


def test_an_impossible_slo_gives_the_least_late_plan_and_what_would_do() -> None:
    rng = np.random.default_rng(6)
    system = random_system(rng, layers=4, experts=8)
    demand = random_demand(rng, system)
    planner = WholePlanner(system, demand)
    ttft_s, tpot_s = planner.fastest()
    late = WholePlanner(system, demand, limits=Limits(ttft_s / 2, tpot_s / 2)).plan()
    assert not late.feasible
    assert late.limit_tpot_s >= tpot_s * (1 - 1e-9)
    enough = WholePlanner(system, demand, limits=Limits(ttft_s * 3, tpot_s * 1.0001)).plan(
        "per-layer"
    )
    assert enough.feasible


def test_slower_limits_make_the_plan_more_careful() -> None:
    rng = np.random.default_rng(9)
    system = random_system(rng, layers=6, experts=8, invocation_s=1e-3)
    demand = random_demand(rng, system)
    careless = WholePlanner(system, demand)
    free = careless.plan("largest")
    limits = Limits(tpot_s=free.limit_tpot_s * 1.02)
    slow = system.with_(invocation_s=4e-3)
    usual = WholePlanner(system, demand, limits=limits).plan("largest")
    robust = WholePlanner(system, demand, limits=limits, slow=slow).plan("largest")
    assert robust.feasible
    assert robust.counts.sum() < usual.counts.sum()
    assert robust.limit_tpot_s <= limits.tpot_s * (1 + 1e-9)
    # The bill is the mean system's.
    again = WholePlanner(system, demand).priced(robust.counts, robust.specs, robust.replicas)
    assert again is not None
    assert again.estimate.cost_usd == pytest.approx(robust.estimate.cost_usd)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_s_specs_can_be_planned_with(platform: str) -> None:
    rng = np.random.default_rng(4)
    specs = platform_specs(platform, most_gb=6.0)  # type: ignore[arg-type]
    system = random_system(rng, layers=3, experts=8, specs=specs)
    plan = WholePlanner(system, random_demand(rng, system)).plan("per-layer")
    assert plan.feasible
    used = plan.counts > 0
    held = plan.counts * system.expert_gb + system.expert_runtime_gb
    assert (specs.memory_gb[plan.specs][used] >= held[used] - 1e-9).all()


@pytest.mark.parametrize("granularity", ["expert", "layer", "block"])
def test_functions_can_hold_an_expert_a_layer_or_several(granularity: str) -> None:
    rng = np.random.default_rng(8)
    system = random_system(rng, layers=6, experts=8, granularity=granularity, blocks=(0, 2, 4))
    plan = WholePlanner(system, random_demand(rng, system)).plan("per-layer")
    if granularity == "block":
        assert (plan.specs[::2] == plan.specs[1::2]).all()
    counts = plan.counts.astype(float)
    if granularity == "block":
        counts = np.repeat(counts.reshape(3, 2).sum(axis=1), 2)
    if granularity == "expert":
        counts = np.minimum(counts, 1)
    held = counts * system.expert_gb + system.expert_runtime_gb
    used = plan.counts > 0
    assert (system.remote.memory_gb[plan.specs][used] >= held[used] - 1e-9).all()
    assert plan.remote.sum(axis=1).tolist() == plan.counts.tolist()


def test_as_built_is_never_dearer_than_as_printed() -> None:
    """One call instead of one for each hit, and each row once, can only help."""
    rng = np.random.default_rng(12)
    for _ in range(20):
        system = random_system(rng, layers=3, experts=8, payload_bytes=1e9)
        demand = random_demand(rng, system)
        planner = WholePlanner(system, demand)
        plan = planner.plan("fixed")
        built = planner.priced(plan.counts, plan.specs, np.ones(3, np.intp))
        assert built is not None
        printed = evaluate_as_printed(
            system,
            Configuration(built.remote, built.specs, built.replicas, built.main),
            Routes(
                demand.prompt_tokens,
                demand.decode_tokens,
                demand.prompt_tokens * system.top_k * demand.prefill,
                system.top_k * demand.decode[None],
            ),
        )
        assert built.estimate.remote_decode_usd <= printed.remote_decode_usd * (1 + 1e-9)
        assert built.estimate.prefill_s <= printed.prefill_s * (1 + 1e-9)


def test_a_tighter_slo_never_raises_the_preallocated_ratio() -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        system = random_system(rng, layers=4, experts=8)
        tpots = np.geomspace(1e-4, 1, 25)
        found = [
            preallocate(system, Limits(tpot_s=tpot), prompt_tokens=100, decode_tokens=100)
            for tpot in tpots
        ]
        counts = [one.remote_count for one in found]
        assert counts == sorted(counts)
        assert [one.feasible for one in found] == sorted(one.feasible for one in found)
        assert found[-1].remote_count == system.experts
        for one in found:
            if one.feasible:
                assert one.worst.main_gb <= system.main.memory_gb[one.main] + 1e-9
            else:
                assert one.ratio == 0


def test_the_preallocated_ratio_keeps_what_passed_the_test() -> None:
    system = random_system(np.random.default_rng(1), layers=4, experts=8)
    loose = preallocate(system, Limits(), prompt_tokens=64, decode_tokens=64)
    assert (loose.ratio, loose.feasible) == (1.0, True)
    exact = Limits(tpot_s=loose.worst.tpot_s)
    assert preallocate(system, exact, prompt_tokens=64, decode_tokens=64).ratio == 1.0
