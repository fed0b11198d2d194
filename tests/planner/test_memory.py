from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.memory import MemoryRule
from planner.model import ModelFacts
from remoe.experts import Partition
from remoe.topology import ExpertEndpoint

MODEL = ModelFacts(
    name="m",
    digest="d",
    layers=2,
    moe_layers=(0, 1),
    experts=4,
    top_k=2,
    hidden_size=8,
    vocab_size=10,
    context_length=100,
    expert_size_bytes=1_000_000_000,
    non_expert_size_bytes=3_000_000_000,
    kv_bytes_per_token=10_000_000,
)
RULE = MemoryRule(model=MODEL, main_runtime_gb=0.5, expert_runtime_gb=0.25, expert_expansion=2.0)
PARTITION = Partition(experts=4, remote=((0, 1, 3), (2,)))
SUBSETS = st.lists(
    st.sets(st.integers(0, 3)).map(lambda s: tuple(sorted(s))), min_size=2, max_size=2
)


def function(first: int, last: int) -> ExpertEndpoint:
    return ExpertEndpoint(
        name=f"{first}-{last}", url="", first_layer=first, last_layer=last, memory_gb=1.0
    )


def test_main_memory_is_the_sum_of_what_the_main_function_holds() -> None:
    # 3 GB non-expert, 4 of 8 experts, 50 tokens at 10 MB, 0.5 GB run-time.
    assert RULE.main_gb(PARTITION, 50) == pytest.approx(3 + 4 + 0.5 + 0.5)


def test_dense_layers_hold_no_experts() -> None:
    model = dataclasses.replace(MODEL, layers=3, moe_layers=(1, 2))
    rule = dataclasses.replace(RULE, model=model)
    partition = Partition(experts=4, remote=((), (0, 1, 3), (2,)))
    assert rule.main_gb(partition, 50) == RULE.main_gb(PARTITION, 50)


def test_expert_memory_is_its_remote_experts_widened() -> None:
    assert RULE.expert_gb(PARTITION, function(0, 0)) == pytest.approx(3 * 2 + 0.25)
    assert RULE.expert_gb(PARTITION, function(0, 1)) == pytest.approx(4 * 2 + 0.25)


@given(remote=SUBSETS, tokens=st.integers(1, 100))
def test_main_and_expert_functions_together_hold_every_expert_once(
    remote: list[tuple[int, ...]], tokens: int
) -> None:
    partition = Partition(experts=4, remote=tuple(remote))
    held_remotely = sum(
        (RULE.expert_gb(partition, function(layer, layer)) - 0.25) / 2 for layer in range(2)
    )
    main = RULE.main_gb(partition, tokens)
    assert main + held_remotely == pytest.approx(3 + 8 + 0.5 + tokens * 0.01)
