"""Experts in a GPU's slots: none is overwritten before it is computed, whatever was sent ahead."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from main_model_fn.device_experts import expert_output
from main_model_fn.exchange import Exchange
from main_model_fn.slots import Slots, SlotsOf
from main_model_fn.streaming import ExpertWeights
from remoe.activation import SILU
from remoe.kernel.native_library import NativePool

CPU = torch.device("cpu")
HIDDEN, INNER = 8, 4
EXPERTS = [
    ExpertWeights.within(torch.randn(ExpertWeights.size(INNER, HIDDEN)), INNER, HIDDEN)
    for _ in range(24)
]
calls = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6
)


@given(asked=calls)
def test_each_expert_is_computed_once_with_its_own_gate(
    asked: list[tuple[int, int, int]], pool: NativePool
) -> None:
    """Of each call: experts sent now, experts sent ahead for the next, and how many it wants."""
    slots = Slots(EXPERTS[0], CPU, pool, count=4, most_rows=1)
    exchange = Exchange(1, HIDDEN, 2, 1, dtype=torch.float32, device=CPU)
    slots_of = SlotsOf(slots, exchange, SILU)
    exchange.rows.copy_(torch.randn(1, HIDDEN))
    ahead, there = list[int](), list[ExpertWeights]()
    for count, following, wanted in asked:
        exchange.total.zero_()
        experts = [*there[:wanted], *EXPERTS[:count]]
        gates = [0.5 + number for number in range(len(experts))]
        sent = EXPERTS[12 : 12 + following]
        _, later = slots_of.add(
            experts[len(ahead[:wanted]) :],
            gates.__getitem__,
            ahead=ahead[:wanted],
            unwanted=len(ahead[wanted:]),
            following=lambda sent=sent: sent,  # type: ignore[misc]
        )
        exact = torch.zeros(1, HIDDEN)
        for gate, weights in zip(gates, experts, strict=True):
            exact += expert_output(exchange.rows, weights, SILU) * gate
        torch.testing.assert_close(exchange.total, exact)
        ahead, there = later, sent[: len(later)]
