"""The local half of a layer: experts computed here, and which those are while the layer serves.

Natively on the mapped checkpoint where the model is on the CPU, or by torch, operation by
operation as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from main_model_fn.native_dtypes import KERNEL_DTYPES
from main_model_fn.routes import Batch, Route
from main_model_fn.streaming import ExpertWeights
from remoe.checkpoint import Checkpoint
from remoe.experts import ExpertId
from remoe.kernel.native_kernel import ExpertTable, NativeKernel
from remoe.kernel.structures import Matrix

__all__ = [
    "ExpertsModule",
    "LocalExperts",
    "NativeExperts",
    "NativeResidents",
    "Residents",
    "TorchExperts",
]


class ExpertsModule(Protocol):
    """What a fused-experts module of transformers offers, once its own weights are gone."""

    is_transposed: bool

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...


class Residents(Protocol):
    """The experts that one layer holds at a moment; attaching and detaching makes another."""

    @property
    def experts(self) -> frozenset[int]: ...

    def add(
        self, total: torch.Tensor, module: ExpertsModule, batch: Batch, *, beside: bool = False
    ) -> None:
        """Add these experts' outputs, weighted, to `total` [tokens, hidden].

        `beside` says that others compute on this machine's processors at the same time.
        """
        ...


class LocalExperts(Protocol):
    """The resident experts of one layer, and the means to compute any other.

    `attach` and `detach` may be called from another thread while a batch is computed.
    """

    @property
    def residents(self) -> Residents:
        """To be asked for once a batch, so that each route goes to one place."""
        ...

    def new_sum(self, hidden: torch.Tensor) -> torch.Tensor:
        """Zeros in the shape of `hidden`, of the type in which sums over experts are kept."""
        ...

    def add_lost(
        self,
        total: torch.Tensor,
        module: ExpertsModule,
        batch: Batch,
        routes: Mapping[int, Route],
    ) -> None:
        """Add the outputs of experts that are not resident: read for this, and let go."""
        ...

    def attach(self, experts: Iterable[int]) -> None:
        """Make experts resident: their weights are in memory when this returns."""
        ...

    def detach(self, experts: Iterable[int]) -> None:
        """Let experts go: their memory is the system's again when no batch uses them."""
        ...


class NativeResidents:
    """Experts of one layer as the kernel has them."""

    def __init__(self, table: ExpertTable) -> None:
        self.table = table
        self.experts = table.experts

    def add(
        self, total: torch.Tensor, module: ExpertsModule, batch: Batch, *, beside: bool = False
    ) -> None:
        rows = batch.hidden.contiguous()
        index, gates = batch.index.contiguous(), batch.gate_weights
        self.table.add(
            total.data_ptr(),
            Matrix(rows.data_ptr(), KERNEL_DTYPES[rows.dtype]),
            index.data_ptr(),
            gates.data_ptr(),
            (index.shape[0], index.shape[1]),
            beside=beside,
        )


class NativeExperts:
    """The kernel on weights where they lie in the checkpoint's files: nothing is copied."""

    def __init__(self, layer: int, kernel: NativeKernel, checkpoint: Checkpoint) -> None:
        self._layer = layer
        self._kernel = kernel
        self._checkpoint = checkpoint
        self.residents = self._of(frozenset())

    def new_sum(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden.shape, dtype=torch.float32)

    def add_lost(
        self,
        total: torch.Tensor,
        module: ExpertsModule,
        batch: Batch,
        routes: Mapping[int, Route],
    ) -> None:
        experts = [ExpertId(self._layer, index) for index in routes]
        self._kernel.weighted_sum(experts, batch.routed(routes), total.numpy())
        self._let_go(routes.keys() - self.residents.experts)

    def attach(self, experts: Iterable[int]) -> None:
        wanted = frozenset(experts)
        for index in wanted - self.residents.experts:
            self._kernel.load(ExpertId(self._layer, index))
        self.residents = self._of(self.residents.experts | wanted)

    def detach(self, experts: Iterable[int]) -> None:
        unwanted = self.residents.experts & frozenset(experts)
        self.residents = self._of(self.residents.experts - unwanted)
        self._let_go(unwanted)

    def _of(self, resident: frozenset[int]) -> NativeResidents:
        checkpoint = self._checkpoint
        return NativeResidents(
            self._kernel.table(
                self._layer, resident, experts=checkpoint.experts, hidden=checkpoint.hidden_size
            )
        )

    def _let_go(self, experts: Iterable[int]) -> None:
        """A batch that still reads them finds the same bytes: the pages come back from the file."""
        for index in experts:
            expert = ExpertId(self._layer, index)
            self._kernel.forget(expert)
            for tensor in self._checkpoint.expert(expert).all():
                tensor.release()


@dataclass(frozen=True, slots=True)
class _TorchResidents:
    weights: Mapping[int, ExpertWeights]

    @property
    def experts(self) -> frozenset[int]:
        return frozenset(self.weights)

    def add(
        self, total: torch.Tensor, module: ExpertsModule, batch: Batch, *, beside: bool = False
    ) -> None:
        for index, route in batch.routes.items():
            if index in self.weights:
                _add_expert(total, module, batch, route, self.weights[index])


class TorchExperts:
    """Weights copied to the model's device; the sum is kept in the model's type."""

    def __init__(self, layer: int, read: Callable[[ExpertId], ExpertWeights]) -> None:
        self._layer = layer
        self._read = read
        self.residents = _TorchResidents({})

    def new_sum(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)

    def add_lost(
        self,
        total: torch.Tensor,
        module: ExpertsModule,
        batch: Batch,
        routes: Mapping[int, Route],
    ) -> None:
        for index, route in routes.items():
            weights = self._read(ExpertId(self._layer, index))
            _add_expert(total, module, batch, route, weights)

    def attach(self, experts: Iterable[int]) -> None:
        held = self.residents.weights
        new = {i: self._read(ExpertId(self._layer, i)) for i in experts if i not in held}
        self.residents = _TorchResidents({**held, **new})

    def detach(self, experts: Iterable[int]) -> None:
        unwanted = frozenset(experts)
        kept = {i: w for i, w in self.residents.weights.items() if i not in unwanted}
        self.residents = _TorchResidents(kept)


def _add_expert(
    total: torch.Tensor,
    module: ExpertsModule,
    batch: Batch,
    route: Route,
    weights: ExpertWeights,
) -> None:
    tokens, slots = (torch.from_numpy(part).to(total.device) for part in route)
    gate_up = _project(  # [routes, 2 x inner]
        batch.hidden[tokens], weights.gate_up, weights.gate_up_bias, module.is_transposed
    )
    inner = module._apply_gate(gate_up)  # noqa: SLF001
    expert_out = _project(inner, weights.down, weights.down_bias, module.is_transposed)
    weighted = (expert_out * batch.gates[tokens, slots, None]).to(total.dtype)
    # The same sums as `index_add_`, whose parallel region costs more than a token's additions
    # (0.33 ms against 6 us for one row in bfloat16 on two busy cores).
    if len(total) == 1:
        total += weighted
    else:
        total[tokens] += weighted


def _project(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    projected = rows @ weight if transposed else functional.linear(rows, weight)
    return projected if bias is None else projected + bias
