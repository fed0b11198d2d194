"""One MoE layer split in two: resident experts here, the others behind a transport.

Registered with transformers' experts registry, so that attention, router, norms and shared
experts stay the library's own for every family (papers.md A.2; peers-and-conventions 6.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from main_model_fn.fan_out import FanOut, Route, SentCall
from main_model_fn.metering import StepMeter
from main_model_fn.transport import ExpertTransport
from remoe.experts import ExpertId

__all__ = ["EXPERTS_IMPLEMENTATION", "ExpertWeights", "LayerExperts", "split_experts_forward"]

EXPERTS_IMPLEMENTATION = "remoe_split"


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert, laid out as its module says.

    `gate_up` is [2 x intermediate, hidden] and `down` [hidden, intermediate], or both transposed.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class _ExpertsModule(Protocol):
    """What a fused-experts module of transformers offers, once its own weights are gone."""

    remoe: LayerExperts
    is_transposed: bool

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a layer was called with: `hidden` [tokens, hidden], `gates` [tokens, top_k]."""

    module: _ExpertsModule
    hidden: torch.Tensor
    gates: torch.Tensor


class LayerExperts:
    """The split experts of one layer. `load` reads any expert from the checkpoint."""

    def __init__(
        self,
        *,
        layer: int,
        model_digest: str,
        resident: dict[int, ExpertWeights],
        load: Callable[[ExpertId], ExpertWeights],
        transport: ExpertTransport,
        function_memory_gb: float,
        meter: StepMeter,
    ) -> None:
        self.layer = layer
        self.resident = resident
        self._load = load
        self._meter = meter
        self._fan_out = FanOut(
            layer=layer,
            model_digest=model_digest,
            transport=transport,
            function_memory_gb=function_memory_gb,
            meter=meter,
        )

    def forward(
        self,
        module: _ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum over the routed experts; all tensors are [tokens, ...], output like hidden.

        Remote calls leave first, local experts are computed while they fly.
        """
        batch = _Batch(module, hidden, top_k_weights)
        index = top_k_index.cpu().numpy()  # [tokens, top_k]
        self._meter.record_routes(self.layer, index)
        routes = {
            expert: Route(*np.nonzero(index == expert)) for expert in np.unique(index).tolist()
        }
        remote = {e: route for e, route in routes.items() if e not in self.resident}
        sent = self._fan_out.send(hidden, top_k_weights, remote) if remote else []
        output = torch.zeros_like(hidden)
        for expert, route in routes.items():
            if expert in self.resident:
                _add_expert(batch, output, route, self.resident[expert])
        for call in sent:
            self._add_remote(batch, output, call)
        return output

    def _add_remote(self, batch: _Batch, output: torch.Tensor, call: SentCall) -> None:
        """Add the returned partial sums, or compute them here if the function is lost."""
        partial = self._fan_out.receive(call)
        if partial is not None:
            _add_rows(output, torch.from_numpy(call.rows), partial)
            return
        for expert, route in call.routes.items():
            _add_expert(batch, output, route, self._load(ExpertId(self.layer, expert)))


def _add_expert(batch: _Batch, output: torch.Tensor, route: Route, weights: ExpertWeights) -> None:
    """Add one expert's share to `output`, operation by operation as transformers does."""
    tokens, slots = (torch.from_numpy(part).to(output.device) for part in route)
    module = batch.module
    gate_up = _project(  # [routes, 2 x inner]
        batch.hidden[tokens], weights.gate_up, weights.gate_up_bias, module.is_transposed
    )
    inner = module._apply_gate(gate_up)  # noqa: SLF001
    expert_out = _project(inner, weights.down, weights.down_bias, module.is_transposed)
    _add_rows(output, tokens, expert_out * batch.gates[tokens, slots, None])


def _project(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    projected = rows @ weight if transposed else functional.linear(rows, weight)
    return projected if bias is None else projected + bias


def _add_rows(output: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """output[tokens] += rows, each token at most once.

    The same sums as `index_add_`, whose parallel region costs more than a token's additions
    (0.33 ms against 6 us for one row in bfloat16 on two busy cores).
    """
    rows = rows.to(output.device, output.dtype)
    if len(output) == 1:
        output += rows
    else:
        output[tokens.to(output.device)] += rows


def split_experts_forward(
    self: _ExpertsModule,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The function registered with transformers; `self` is the model's experts module."""
    return self.remoe.forward(self, hidden_states, top_k_index, top_k_weights)
