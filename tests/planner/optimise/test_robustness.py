from __future__ import annotations

import numpy as np
import pytest

from planner.optimise.as_built import Demand
from planner.optimise.cost_baselines import baselines
from planner.optimise.robustness import Uncertainty
from planner.optimise.simulation import Jitter, simulate
from planner.optimise.whole_plan import Limits, WholePlanner
from remoe.hardware import Spread
from tests.planner.optimise.systems import random_system

NONE = Jitter(1.0, 1.0)


def test_the_simulation_without_jitter_is_what_the_model_expects() -> None:
    rng = np.random.default_rng(0)
    system = random_system(rng, layers=4, experts=8, cold_start_s=1.0)
    profile = np.tile(np.linspace(8, 1, 8) / 36, (4, 1))
    demand = Demand(profile, profile, 120.0, 150.0)
    plan = WholePlanner(system, demand).plan("largest")
    outcome = simulate(
        system,
        demand,
        plan,
        rng=rng,
        requests=40,
        call_jitter=NONE,
        request_jitter=NONE,
        cold_jitter=NONE,
    )
    assert outcome.tpot_s.mean() == pytest.approx(plan.estimate.tpot_s, rel=0.05)
    assert outcome.ttft_s.mean() == pytest.approx(plan.estimate.ttft_s, rel=0.05)


def test_robust_plans_hold_where_the_papers_break() -> None:
    rng = np.random.default_rng(21)
    jitter = Jitter()
    robust, printed = list[float](), list[float]()
    for _ in range(6):
        system = random_system(
            rng,
            layers=6,
            experts=8,
            invocation_s=float(rng.uniform(5e-4, 3e-3)),
            cold_start_s=float(rng.uniform(0.5, 3)),
        )
        profile = rng.dirichlet(np.full(8, 0.5), 6)
        demand = Demand(profile, profile, 80.0, 60.0)
        both = jitter.sample(rng, 20_000) * jitter.sample(rng, 20_000)
        uncertain = Uncertainty(
            Spread.of(system.invocation_s * both),
            Spread.of(system.cold_start_s * jitter.sample(rng, 20_000)),
        )
        mix = baselines(system, demand, gpu_speedup=10)[0]
        limits = Limits(1.2 * mix.ttft_s + uncertain.cold_start.p975_s, 1.2 * mix.tpot_s)
        careful = WholePlanner(
            uncertain.expected(system), demand, limits=limits, slow=uncertain.slow(system)
        ).plan("cost")
        assert careful.feasible
        usual = WholePlanner(
            system.with_(
                invocation_s=uncertain.invocation.median_s,
                cold_start_s=uncertain.cold_start.median_s,
            ),
            demand,
            limits=limits,
        ).plan("largest")
        for plan, attained in ((careful, robust), (usual, printed)):
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
            attained.append(outcome.attained(limits.ttft_s, limits.tpot_s))
    assert np.mean(robust) >= 0.95
    assert np.mean(printed) < 0.8
