"""Bounds, replicas, specs, expert times and the memory problem, each by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.optimise.bounds import confidence, excess, worst_load
from planner.optimise.expert_times import ExpertTimes
from planner.optimise.knapsack import choose
from planner.optimise.memory_problem import memory_problem
from planner.optimise.replicas import lpt, lpt_bound
from planner.optimise.specs import PLATFORMS, SpecTable, platform_specs, proportional
from remoe.hardware import AllocationCurve
from tests.planner.optimise.systems import random_demand, random_system


def test_hoeffding_s_golden_values() -> None:
    assert confidence(100, excess(100, printed=True)) == pytest.approx(0.77687, abs=5e-6)
    assert confidence(100, excess(100)) == pytest.approx(0.95021, abs=5e-6)


def test_the_worst_load_vanishes_with_nothing_remote_and_never_exceeds_all() -> None:
    assert worst_load(1200, 0) == 0
    assert worst_load(1200, 1) == 1200
    # A.9: 0.21 + 6 b hits of a token and layer for 200 tokens and top-6.
    assert worst_load(1200, 0.25) / 200 == pytest.approx(0.2121 + 1.5, abs=1e-4)


@settings(deadline=None)
@given(
    loads=st.lists(st.floats(0, 10), min_size=1, max_size=6),
    replicas=st.integers(1, 3),
)
def test_lpt_stays_within_its_bounds(loads: list[float], replicas: int) -> None:
    values = np.array(loads)
    owner = lpt(values[None], replicas)[0]
    largest = np.bincount(owner, values, replicas).max()
    assert largest <= lpt_bound(values, replicas) + 1e-9
    best = min(
        np.bincount(np.array(split), values, replicas).max()
        for split in itertools.product(range(replicas), repeat=len(loads))
    )
    assert largest <= (4 / 3 - 1 / (3 * replicas)) * best + 1e-9


def test_platforms_sell_what_their_lists_say() -> None:
    specs = {platform: platform_specs(platform, most_gb=8) for platform in PLATFORMS}
    by_lambda = specs["lambda"]
    one = int(np.searchsorted(by_lambda.vcpus, 1.0))
    assert by_lambda.memory_gb[one] == pytest.approx(1769 * 2**20 / 1e9, rel=0.04)
    assert specs["proportional"].vcpus == pytest.approx(specs["proportional"].memory_gb)
    fargate = specs["fargate"]
    quarter = fargate.vcpus == 0.25
    assert fargate.memory_gb[quarter] * 1e9 / 2**30 == pytest.approx([0.5, 1.0, 1.5, 2.0])
    # More vCPUs for the same memory cost more: a step function, not one curve.
    same = np.isclose(fargate.memory_gb, 2 * 2**30 / 1e9)
    assert len(set(fargate.vcpus[same])) > 1
    assert (np.diff(fargate.usd_per_s[same][np.argsort(fargate.vcpus[same])]) > 0).all()
    assert specs["cloud-run"].vcpus.min() == 1


def test_a_spec_table_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="ascending"):
        proportional([2.0, 1.0])
    with pytest.raises(ValueError, match="above 0"):
        SpecTable(np.array([1.0]), np.array([0.0]), np.array([1.0]))
    with pytest.raises(ValueError, match="more than the largest spec"):
        proportional([1.0, 2.0]).smallest(2.5)
    assert proportional([1.0, 2.0]).smallest(1.0) == 0


@settings(deadline=None)
@given(rows=st.lists(st.floats(0, 1000), min_size=1, max_size=8), vcpus=st.floats(0.1, 4))
def test_total_expert_time_is_linear_in_the_spread_of_rows(rows: list[float], vcpus: float) -> None:
    knots = np.array([1.0, 8.0, 64.0])
    curves = tuple(AllocationCurve.inverse(seconds) for seconds in (1.0, 2.0, 9.0))
    times = ExpertTimes(knots, curves)
    values = np.array(rows)
    expected = np.where(
        values <= 64,
        np.interp(values, [0, *knots], [0, 1, 2, 9]),
        9 + (values - 64) * (9 - 2) / (64 - 8),
    )
    assert times.seconds(values, vcpus) == pytest.approx(expected / vcpus)
    total = times.basis(values).sum(axis=0) @ times.at([vcpus])[:, 0]
    assert total == pytest.approx(times.seconds(values, vcpus).sum())


def test_the_printed_memory_problem_can_be_solved_and_counts_calls_as_told() -> None:
    rng = np.random.default_rng(0)
    system = random_system(rng, layers=4, experts=8)
    demand = random_demand(rng, system)
    remote = np.zeros((4, 8), np.bool_)
    remote[:3, 5:] = True
    problems = {
        calls: memory_problem(
            system, demand.decode, remote, main=5, tokens=100, tpot_s=10, calls=calls
        )
        for calls in ("per-layer", "expected", "per-hit")
    }
    for problem in problems.values():
        assert choose(problem.cost, problem.use, problem.budget).feasible
        assert (problem.use[0, 3] == 0).all()
    held = 3 * system.expert_gb + system.expert_runtime_gb
    too_small = system.remote.memory_gb < held
    assert np.isinf(problems["expected"].cost[:3, too_small]).all()
    assert (problems["expected"].use <= problems["per-layer"].use + 1e-15).all()
    assert (problems["expected"].use <= problems["per-hit"].use + 1e-15).all()
