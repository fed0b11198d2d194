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

__all__ = ["Batch", "CallRows", "Grouped", "Route", "routes_by_expert"]


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


# The rows of as many tokens go to the host with their routes: they most likely are needed there.
_FEW_TOKENS = 64


class Grouped(NamedTuple):
    """All routes of a batch on its device, expert by expert in ascending order.

    Of the i-th, `tokens[i]` is whose it is and `gates[i]` float32 its weight; both [routes].
    """

    tokens: torch.Tensor
    gates: torch.Tensor


class CallRows(NamedTuple):
    """Rows for some experts as a call carries them (remoe/expert_call.py).

    `tokens` [rows] says which of the batch's they are, in ascending order.
    """

    tokens: NDArray[np.intp]
    hidden: bytes
    experts: list[int]
    offsets: list[int]
    row_index: bytes
    gate: bytes


@dataclass(frozen=True)
class Batch:
    """What a layer was called with: `hidden` [tokens, hidden], `gates` [tokens, top_k].

    `index` int64 [tokens, top_k] says which experts were chosen, on the CPU; `chosen` is the same
    where `hidden` is.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor
    chosen: torch.Tensor
    host_hidden: torch.Tensor | None = None
    host_gates: torch.Tensor | None = None

    @classmethod
    def of(cls, hidden: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> Batch:
        """The batch, of tensors of one device; waits for a GPU once."""
        if hidden.device.type == "cpu":
            return cls(hidden, chosen, gates, chosen)
        # What is copied without waiting arrives in pinned memory, which torch keeps for the next.
        wanted = [chosen, gates.float()]
        if len(hidden) <= _FEW_TOKENS:
            wanted.append(hidden)
        index, host_gates, *rows = (tensor.to("cpu", non_blocking=True) for tensor in wanted)
        torch.cuda.current_stream(hidden.device).synchronize()
        return cls(hidden, index, gates, chosen, rows[0] if rows else None, host_gates)

    @property
    def given(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As an experts module is called."""
        return self.hidden, self.chosen, self.gates

    @cached_property
    def routes(self) -> dict[int, Route]:
        return routes_by_expert(self.index.numpy())

    @cached_property
    def experts(self) -> frozenset[int]:
        """The experts that were chosen at all."""
        return frozenset(self.index.flatten().tolist())

    @cached_property
    def counts(self) -> dict[int, int]:
        """How many rows each chosen expert has, in ascending order of experts."""
        if len(self.hidden) == 1:
            return dict.fromkeys(sorted(self.index[0].tolist()), 1)
        counts = np.bincount(self.index.numpy().ravel())
        return {expert: count for expert, count in enumerate(counts.tolist()) if count}

    @cached_property
    def grouped(self) -> Grouped:
        order = self.chosen.flatten().argsort(stable=True)
        tokens = order.div(self.chosen.shape[1], rounding_mode="floor")
        return Grouped(tokens, self.gates.flatten()[order].float())

    @cached_property
    def gate_weights(self) -> torch.Tensor:
        """The gates as float32 [tokens, top_k] on the CPU."""
        gates = self.gates if self.host_gates is None else self.host_gates
        return gates.float().cpu().contiguous()

    @cached_property
    def stored_rows(self) -> NDArray[np.generic]:
        """The hidden states as the kernel takes them: uint16 is bfloat16."""
        rows = self.hidden if self.host_hidden is None else self.host_hidden
        rows = rows.cpu().contiguous()
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
