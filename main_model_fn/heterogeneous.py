"""One layer's local experts with a GPU: each is computed where it ends first (placement.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from main_model_fn.local_experts import ExpertsModule
from main_model_fn.machine import Machine
from main_model_fn.pinned_experts import slices_of
from main_model_fn.routes import Batch, Route
from main_model_fn.streaming import ExpertWeights
from remoe.experts import ExpertId
from remoe.kernel.native_kernel import ExpertTable

__all__ = ["HeterogeneousExperts", "HeterogeneousResidents"]


@dataclass(frozen=True)
class HeterogeneousResidents:
    """One layer's: `hot` are on the GPU, `cold` in pinned memory."""

    machine: Machine
    layer: int
    hot: Mapping[int, ExpertWeights]
    cold: Mapping[int, ExpertWeights]

    @cached_property
    def experts(self) -> frozenset[int]:
        return frozenset(self.hot) | frozenset(self.cold)

    @cached_property
    def slices(self) -> dict[int, list[ExpertWeights]]:
        """Of each expert."""
        return {index: weights.cut() for index, weights in (*self.hot.items(), *self.cold.items())}

    @cached_property
    def cold_table(self) -> ExpertTable:
        """The slices of at least one cold expert."""
        machine, (_, hidden) = self.machine, self.machine.like.shape
        parts = [p for i in self.cold for p in slices_of(ExpertId(self.layer, i), machine.slices)]
        indices = [part.index for part in parts]
        return machine.kernel.table(self.layer, indices, experts=max(indices) + 1, hidden=hidden)

    def add(
        self, total: torch.Tensor, module: ExpertsModule, batch: Batch, *, beside: bool = False
    ) -> None:
        counts = {e: n for e, n in batch.counts.items() if e in self.hot or e in self.cold}
        self.machine.compute(self, self.machine.place(counts, self.hot), total, batch)


class HeterogeneousExperts:
    """One layer's experts on a machine; those of `hottest` go to the GPU when they are attached."""

    def __init__(self, layer: int, machine: Machine, hottest: frozenset[int] = frozenset()) -> None:
        self._layer = layer
        self.machine = machine
        self._hottest = hottest
        self.residents = self._of({}, {})

    def new_sum(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)

    def add_lost(
        self,
        total: torch.Tensor,
        module: ExpertsModule,
        batch: Batch,
        routes: Mapping[int, Route],
    ) -> None:
        machine = self.machine
        parts, rows = machine.routed(self._layer, batch, routes)
        total += torch.from_numpy(machine.kernel.weighted_sum(parts, rows)).to(total.device)
        lost = routes.keys() - self.residents.experts
        machine.drop(ExpertId(self._layer, index) for index in lost)

    def attach(self, experts: Iterable[int]) -> None:
        new = frozenset(experts) - self.residents.experts
        machine = self.machine
        loaded = {index: machine.load(ExpertId(self._layer, index)) for index in sorted(new)}
        hot = {i: w.to(machine.device) for i, w in loaded.items() if i in self._hottest}
        self.adopt(hot, {i: w for i, w in loaded.items() if i not in hot})

    def adopt(self, hot: Mapping[int, ExpertWeights], cold: Mapping[int, ExpertWeights]) -> None:
        """Make experts resident whose weights are where they belong already."""
        self.machine.hold(
            {ExpertId(self._layer, index): w for index, w in cold.items()}, hot.values()
        )
        held = self.residents
        self.residents = self._of({**held.hot, **hot}, {**held.cold, **cold})

    def detach(self, experts: Iterable[int]) -> None:
        unwanted, held = frozenset(experts), self.residents
        hot = {i: w for i, w in held.hot.items() if i not in unwanted}
        cold = {i: w for i, w in held.cold.items() if i not in unwanted}
        self.residents = self._of(hot, cold)
        self.machine.drop(ExpertId(self._layer, index) for index in unwanted)

    def _of(
        self, hot: Mapping[int, ExpertWeights], cold: Mapping[int, ExpertWeights]
    ) -> HeterogeneousResidents:
        return HeterogeneousResidents(self.machine, self._layer, hot, cold)
