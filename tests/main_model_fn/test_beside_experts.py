"""Shared experts give the same wherever a block asks for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from main_model_fn.beside_experts import SharedExperts, shared_experts, shared_replaced


class Routed(nn.Module):
    """Routed experts that have the shared ones computed, as a step with graphs has."""

    beside: SharedExperts | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.beside is not None:
            self.beside.compute(hidden)
        return 2 * hidden


class Block(nn.Module):
    def __init__(self, *, shared_first: bool) -> None:
        super().__init__()
        self.shared_first = shared_first
        self.experts = Routed()
        self.shared_expert = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.view(-1, 8)
        if self.shared_first:
            shared = self.shared_expert(rows)
            both: torch.Tensor = self.experts(rows) + shared
            return both.view(hidden.shape)
        routed: torch.Tensor = self.experts(rows).view(hidden.shape)
        shared = self.shared_expert(hidden)
        return routed.add(shared)


@pytest.mark.parametrize("shared_first", [True, False])
def test_both_orders_give_the_blocks_own(shared_first: bool) -> None:
    block = Block(shared_first=shared_first)
    model = nn.ModuleList([block])
    hidden = torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = block(hidden)
        with shared_replaced(shared_experts(model, {0: block.experts})) as (one,):
            block.experts.beside = one
            assert torch.equal(block(hidden), expected)
        block.experts.beside = None
        assert torch.equal(block(hidden), expected)


def test_another_input_is_computed_for_itself() -> None:
    linear = nn.Linear(4, 4)
    one, first, second = SharedExperts(linear.forward), torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad():
        one.compute(first)
        assert torch.equal(one(second), linear(second))
        assert torch.equal(one(first), linear(first))


def test_layers_without_shared_experts_have_none() -> None:
    block = nn.ModuleDict({"experts": Routed()})
    assert shared_experts(block, {0: block["experts"]}) == [None]
