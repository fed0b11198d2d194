"""Loads to residents and replicas: who goes to zero, who moves in, and what it may cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from remoe.experts import Partition
from remoe.moeless.function_balance import BalanceRules, FunctionShare, balance_functions

LAYERS, EXPERTS = 4, 4
PLANNED = Partition(EXPERTS, ((2, 3),) * LAYERS)
# Four remote experts of 0.01 GB each, and 0.1 GB of the program itself.
FUNCTIONS = (FunctionShare("low", 0, 1, 0.14), FunctionShare("high", 2, 3, 0.14))


def _rules(**changes: float) -> BalanceRules:
    return BalanceRules(**{"expert_gb": 0.01, "room_gb": 1.0, **changes})  # type: ignore[arg-type]


def _loads(layers: dict[int, list[float]]) -> NDArray[np.float64]:
    return np.array([layers.get(layer, [0.0] * EXPERTS) for layer in range(LAYERS)])


def test_a_function_that_is_called_moves_in_and_one_that_is_not_goes_to_zero() -> None:
    loads = _loads({0: [4, 4, 2, 0], 2: [4, 4, 0, 0]})
    balance = balance_functions(loads, PLANNED, FUNCTIONS, _rules())
    assert balance.partition.remote == ((), (), (2, 3), (2, 3))
    assert balance.replicas == {"low": 0, "high": 0}


def test_where_main_memory_is_dear_the_function_keeps_its_experts() -> None:
    loads = _loads({0: [4, 4, 2, 0]})
    balance = balance_functions(loads, PLANNED, FUNCTIONS, _rules(main_price_ratio=4))
    assert balance.partition == PLANNED
    assert balance.replicas == {"low": 1, "high": 0}


def test_a_hot_remote_expert_gets_replicas_up_to_the_most() -> None:
    loads = _loads({0: [1, 1, 30, 1]})
    rules = _rules(room_gb=0, most_replicas=3)
    balance = balance_functions(loads, PLANNED, FUNCTIONS, rules)
    assert balance.replicas == {"low": 3, "high": 0}
    assert balance.scaled_cv[0] < balance.layer_cv[0]


def test_the_most_loaded_function_moves_in_where_there_is_room_for_one() -> None:
    loads = _loads({0: [0, 0, 1, 0], 2: [0, 0, 9, 0]})
    balance = balance_functions(loads, PLANNED, FUNCTIONS, _rules(room_gb=0.05))
    assert balance.partition.remote == ((2, 3), (2, 3), (), ())
    assert balance.replicas == {"low": 1, "high": 0}


def test_what_moved_in_stays_while_others_are_busy_and_goes_when_nobody_is() -> None:
    held = Partition(EXPERTS, ((), (), (2, 3), (2, 3)))
    busy = _loads({2: [1, 1, 0, 0]})
    assert balance_functions(busy, PLANNED, FUNCTIONS, _rules(), held=held).partition == held
    silent = balance_functions(_loads({}), PLANNED, FUNCTIONS, _rules(), held=held)
    assert silent.partition == PLANNED
    assert silent.replicas == {"low": 0, "high": 0}


@given(
    st.lists(st.floats(0, 100), min_size=LAYERS * EXPERTS, max_size=LAYERS * EXPERTS),
    st.floats(0, 0.2),
    st.floats(0.5, 5),
    st.integers(1, 4),
)
def test_no_loaded_expert_is_without_a_place_and_room_is_kept(
    loads: list[float], room_gb: float, ratio: float, most: int
) -> None:
    rules = _rules(room_gb=room_gb, main_price_ratio=ratio, most_replicas=most)
    table = np.array(loads).reshape(LAYERS, EXPERTS)
    balance = balance_functions(table, PLANNED, FUNCTIONS, rules)
    moved = PLANNED.remote_count - balance.partition.remote_count
    assert moved * rules.expert_gb <= room_gb + 1e-9
    for one in FUNCTIONS:
        layers = range(one.first_layer, one.last_layer + 1)
        called = any(
            table[layer, list(balance.partition.remote[layer])].sum() > 0 for layer in layers
        )
        assert (balance.replicas[one.name] > 0) == called
        assert balance.replicas[one.name] <= most


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_memory_that_is_held_never_costs_more_than_the_functions_called(ratio: float) -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        loads = rng.exponential(size=(LAYERS, EXPERTS)) * (rng.random((LAYERS, EXPERTS)) < 0.5)
        rules = _rules(main_price_ratio=ratio)
        balance = balance_functions(loads, PLANNED, FUNCTIONS, rules)
        moved = PLANNED.remote_count - balance.partition.remote_count
        cost = moved * rules.expert_gb * ratio
        cost += sum(balance.replicas[one.name] * one.memory_gb for one in FUNCTIONS)
        called = [
            one
            for one in FUNCTIONS
            if any(loads[n, [2, 3]].sum() > 0 for n in range(one.first_layer, one.last_layer + 1))
        ]
        assert cost <= sum(one.memory_gb for one in called) + 1e-9
