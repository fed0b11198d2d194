"""Shared experts computed while the host computes the routed ones, wherever a model's block asks.

Some blocks ask for them before they ask their router, which then keeps the host waiting, some after
the routed experts. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["SharedExperts", "shared_experts", "shared_replaced"]

_NAMES = ("shared_expert", "shared_experts")
_Forward = Callable[[torch.Tensor], torch.Tensor]


class SharedExperts:
    """In place of one layer's `forward` of them, for one pass: both are called once, in any order."""

    def __init__(self, forward: _Forward) -> None:
        self._forward = forward
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """What they give [..., width]; before `compute`, room for it, which nobody reads yet."""
        if self._input is None:
            self._input, self._output = hidden, torch.empty_like(hidden)
            return self._output
        if self._output is None or hidden.data_ptr() != self._input.data_ptr():
            return self._forward(hidden)
        return self._output.view(hidden.shape)

    def compute(self, hidden: torch.Tensor) -> None:
        """Do it now: for what they were called with, or else for the routed experts' input."""
        if self._input is None or self._output is None:
            self._input, self._output = hidden, self._forward(hidden)
        else:
            self._output.copy_(self._forward(self._input))


def shared_experts(model: nn.Module, experts: Mapping[int, nn.Module]) -> list[nn.Module | None]:
    """Of each layer, beside its routed `experts`."""
    parents = {id(child): module for module in model.modules() for child in module.children()}
    blocks = [parents[id(module)] for module in experts.values()]
    return [
        next((child for name, child in block.named_children() if name in _NAMES), None)
        for block in blocks
    ]


@contextmanager
def shared_replaced(shared: list[nn.Module | None]) -> Iterator[list[SharedExperts | None]]:
    """Have the blocks of the pass within get what `SharedExperts` give."""
    made = [None if module is None else SharedExperts(module.forward) for module in shared]
    replaced: list[tuple[Any, SharedExperts]] = [
        (module, one) for module, one in zip(shared, made, strict=True) if one is not None
    ]
    for module, one in replaced:
        module.forward = one
    try:
        yield made
    finally:
        for module, _ in replaced:
            del module.forward
