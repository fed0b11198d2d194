"""Which tokens of a batch go to which expert of a layer, and with what weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from remoe.kernel.interface import RoutedRows

__all__ = ["Batch", "Route", "routes_by_expert"]


class Route(NamedTuple):
    """The routes to one expert: `slots` says which of a token's top-k choices it was."""

    tokens: NDArray[np.intp]
    slots: NDArray[np.intp]

    def between(self, start: int, end: int) -> Route:
        """The routes from the `start`-th to before the `end`-th."""
        return Route(self.tokens[start:end], self.slots[start:end])

    def of_tokens(self, first: int, last: int) -> Route:
        """The routes of tokens `first` to `last`, included."""
        inside = (self.tokens >= first) & (self.tokens <= last)
        return Route(self.tokens[inside], self.slots[inside])

    def and_also(self, other: Route) -> Route:
        return Route(
            np.concatenate([self.tokens, other.tokens]), np.concatenate([self.slots, other.slots])
        )


_FIRST_TOKEN = np.zeros(1, np.intp)


def routes_by_expert(index: NDArray[np.int64]) -> dict[int, Route]:
    """The routes of `index` [tokens, top_k], by expert in ascending order."""
    if len(index) == 1:  # decoding alone: the same, without a sort
        slots = np.arange(index.size)
        chosen = zip(index[0].tolist(), slots, strict=True)
        return {expert: Route(_FIRST_TOKEN, slots[s : s + 1]) for expert, s in sorted(chosen)}
    order = np.argsort(index, axis=None, kind="stable")
    experts, starts = np.unique(index.ravel()[order], return_index=True)
    tokens, slots = np.divmod(order, index.shape[1])
    ends = [*starts[1:].tolist(), len(order)]
    return {
        expert: Route(tokens[start:end], slots[start:end])
        for expert, start, end in zip(experts.tolist(), starts.tolist(), ends, strict=True)
    }


@dataclass(frozen=True)
class Batch:
    """What a layer was called with: `hidden` [tokens, hidden], `gates` [tokens, top_k].

    `index` int64 [tokens, top_k] says which experts were chosen, on the CPU.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor

    @cached_property
    def routes(self) -> dict[int, Route]:
        return routes_by_expert(self.index.numpy())

    @cached_property
    def experts(self) -> frozenset[int]:
        """The experts that were chosen at all."""
        return frozenset(self.index.flatten().tolist())

    @cached_property
    def gate_weights(self) -> torch.Tensor:
        """The gates as float32 [tokens, top_k] on the CPU."""
        return self.gates.float().cpu().contiguous()

    @cached_property
    def stored_rows(self) -> NDArray[np.generic]:
        """The hidden states as the kernel takes them: uint16 is bfloat16."""
        rows = self.hidden.cpu().contiguous()
        stored: NDArray[np.generic] = (
            rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
        ).numpy()
        return stored

    def routed(self, routes: Mapping[int, Route]) -> RoutedRows:
        """These routes, for the kernel; experts in the order of `routes`."""
        if len(self.hidden) == 1:  # decoding alone: the same, in fewer steps
            chosen = [route.slots[0] for route in routes.values()]
            return RoutedRows(
                hidden=self.stored_rows,
                offsets=range(len(chosen) + 1),
                row_index=np.zeros(len(chosen), np.int32),
                gate=self.gate_weights.numpy()[0, chosen],
            )
        tokens = np.concatenate([route.tokens for route in routes.values()])
        slots = np.concatenate([route.slots for route in routes.values()])
        offsets = [0]
        for route in routes.values():
            offsets.append(offsets[-1] + len(route.tokens))
        return RoutedRows(
            hidden=self.stored_rows,
            offsets=offsets,
            row_index=tokens.astype(np.int32),
            gate=self.gate_weights.numpy()[tokens, slots],
        )
