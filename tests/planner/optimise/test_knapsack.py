from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.optimise.knapsack import Choice, choose
from planner.optimise.milp import choose_by_milp


def memory_instance(
    rng: np.random.Generator, layers: int, specs: int, tightness: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """P1 with exponential latencies: `tightness` 0 leaves TPOT its least, 1 leaves it free."""
    memory = np.linspace(0.2, 0.1 + 0.1 * specs, specs)
    theta = rng.uniform((0.5, 1, 0.05), (3, 12, 0.5), (layers, 3))
    share = rng.dirichlet(np.ones(layers)) * layers * rng.uniform(0.05, 0.8)
    curve = theta[:, :1] * np.exp(-theta[:, 1:2] * memory) + theta[:, 2:]
    seconds = share[:, None] * (curve + 0.01)
    cost = seconds * (rng.uniform(0.5, 8) + memory)
    capacity = rng.integers(0, max(1, specs // 3), layers)
    cost[np.arange(specs) < capacity[:, None]] = np.inf
    least = np.where(np.isfinite(cost), seconds, np.inf).min(axis=1).sum()
    free = seconds[np.arange(layers), cost.argmin(axis=1)].sum()
    return cost, seconds[None], np.array([least + tightness * (free - least)])


def best_by_trying_all(
    cost: NDArray[np.float64], use: NDArray[np.float64], budget: NDArray[np.float64]
) -> float:
    """The cheapest of all choices that fit; infinity if none does."""
    total, used = np.zeros(1), np.zeros((len(use), 1))
    for group in range(len(cost)):
        total = (total[:, None] + cost[group]).ravel()
        used = (used[:, :, None] + use[:, group, None]).reshape(len(use), -1)
    fits = (used <= budget[:, None] * (1 + 1e-9)).all(axis=0)
    return float(np.where(fits, total, np.inf).min())


def test_against_brute_force_on_600_random_instances() -> None:
    rng = np.random.default_rng(11)
    gaps = []
    for _ in range(600):
        problem = memory_instance(
            rng, int(rng.integers(1, 5)), int(rng.integers(2, 13)), rng.uniform(-0.05, 1)
        )
        best, found = best_by_trying_all(*problem), choose(*problem)
        assert found.feasible == np.isfinite(best)
        if found.feasible:
            assert found.bound <= best * (1 + 1e-9)
            gaps.append(found.cost / best - 1)
    assert 450 < len(gaps) < 600, "both kinds must occur"
    assert np.mean(gaps) <= 5e-4
    assert np.max(gaps) <= 5e-3


@pytest.mark.parametrize("tightness", [0.02, 0.3, 0.8])
def test_against_the_integer_program_at_the_size_of_deepseek_v3(tightness: float) -> None:
    problem = memory_instance(np.random.default_rng(7), 61, 41, tightness)
    found, exact = choose(*problem), choose_by_milp(*problem)
    assert found.feasible
    assert exact.feasible
    assert found.cost <= exact.cost * 1.001


def test_the_integer_program_knows_what_is_infeasible() -> None:
    cost, use, budget = memory_instance(np.random.default_rng(1), 4, 6, -0.2)
    assert not choose_by_milp(cost, use, budget).feasible
    found = choose(cost, use, budget)
    assert not found.feasible
    # What it returns instead uses least, of the options that are allowed.
    least = np.where(np.isfinite(cost), use[0], np.inf).argmin(axis=1)
    assert found.option.tolist() == least.tolist()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_several_budgets_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, options, budgets = int(rng.integers(1, 5)), int(rng.integers(2, 6)), 3
    cost = rng.uniform(0.1, 1, (groups, options))
    use = rng.uniform(0, 1, (budgets, groups, options))
    budget = rng.uniform(0.2, 0.9, budgets) * groups
    best, found = best_by_trying_all(cost, use, budget), choose(cost, use, budget)
    if found.feasible:
        used = use[:, np.arange(groups), found.option].sum(axis=1)
        assert (used <= budget * (1 + 1e-8)).all()
        assert found.cost >= best * (1 - 1e-9)
        assert found.cost == pytest.approx(cost[np.arange(groups), found.option].sum())


def test_nothing_binds_without_budgets() -> None:
    cost = np.array([[3.0, 1.0], [np.inf, 2.0]])
    found = choose(cost, np.ones((2, 2, 2)), np.array([np.inf, np.inf]))
    assert (found.option.tolist(), found.cost, found.bound) == ([1, 1], 3.0, 3.0)
    assert isinstance(found, Choice)
