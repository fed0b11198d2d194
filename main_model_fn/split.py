"""One MoE layer split in two: resident experts here, the others behind a transport.

Registered with transformers' experts registry, so that attention, router, norms and shared
experts stay the library's own for every family (papers.md A.2; peers-and-conventions 6.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch.nn import functional

from main_model_fn.metering import StepMeter
from main_model_fn.transport import ExpertTransport, PendingReply
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import MAX_BODY_BYTES, ExpertCall, RowDtype
from remoe.experts import ExpertId

__all__ = ["EXPERTS_IMPLEMENTATION", "ExpertWeights", "LayerExperts", "split_experts_forward"]

EXPERTS_IMPLEMENTATION = "remoe_split"
_log = structlog.get_logger()
_ROW_DTYPE: dict[torch.dtype, RowDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


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


class _Route(NamedTuple):
    """The routes to one expert: `slots` says which of a token's top-k choices it was."""

    tokens: NDArray[np.intp]
    slots: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a layer was called with: `hidden` [tokens, hidden], `gates` [tokens, top_k]."""

    module: _ExpertsModule
    hidden: torch.Tensor
    gates: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Sent:
    pending: PendingReply
    rows: NDArray[np.intp]
    routes: dict[int, _Route]


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
        self._model_digest = model_digest
        self._load = load
        self._transport = transport
        self._function_memory_gb = function_memory_gb
        self._meter = meter

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
            expert: _Route(*np.nonzero(index == expert)) for expert in np.unique(index).tolist()
        }
        remote = {e: route for e, route in routes.items() if e not in self.resident}
        sent = self._send(batch, remote) if remote else []
        output = torch.zeros_like(hidden)
        for expert, route in routes.items():
            if expert in self.resident:
                _add_expert(batch, output, route, self.resident[expert])
        for call in sent:
            self._receive(batch, output, call)
        return output

    def _send(self, batch: _Batch, remote: dict[int, _Route]) -> list[_Sent]:
        """One call with each token's row once; more only where the payload limit asks for it."""
        gates = batch.gates.float().cpu().numpy()  # [tokens, top_k]
        needed = np.unique(np.concatenate([route.tokens for route in remote.values()]))
        # The reply, float32 whatever the request's dtype, is the larger half.
        rows_per_call = max(1, (MAX_BODY_BYTES - 65_536) // (4 * batch.hidden.shape[1]))
        calls = []
        for start in range(0, len(needed), rows_per_call):
            rows = needed[start : start + rows_per_call]
            routes = {}
            for expert, (tokens, slots) in remote.items():
                inside = (tokens >= rows[0]) & (tokens <= rows[-1])
                if inside.any():
                    routes[expert] = _Route(tokens[inside], slots[inside])
            call = self._build_call(batch.hidden, gates, rows, routes)
            calls.append(_Sent(self._transport.send(call), rows, routes))
        return calls

    def _build_call(
        self,
        hidden: torch.Tensor,
        gates: NDArray[np.float32],
        rows: NDArray[np.intp],
        routes: dict[int, _Route],
    ) -> ExpertCall:
        picked = hidden[torch.from_numpy(rows).to(hidden.device)].cpu()  # [rows, hidden]
        tokens = np.concatenate([route.tokens for route in routes.values()])
        slots = np.concatenate([route.slots for route in routes.values()])
        offsets = np.cumsum([len(route.tokens) for route in routes.values()])
        return ExpertCall(
            model_digest=self._model_digest,
            layer=self.layer,
            dtype=_ROW_DTYPE[hidden.dtype],
            rows=len(rows),
            hidden=picked.contiguous().view(torch.uint8).numpy().tobytes(),
            experts=list(routes),
            offsets=[0, *offsets.tolist()],
            row_index=np.searchsorted(rows, tokens).astype("<i4").tobytes(),
            gate=gates[tokens, slots].astype("<f4").tobytes(),
        )

    def _receive(self, batch: _Batch, output: torch.Tensor, call: _Sent) -> None:
        """Add the returned partial sums, or compute them here if the function is lost."""
        try:
            result = call.pending.result()
        except ExpertUnavailableError as error:
            _log.warning(
                "expert_computed_locally",
                layer=self.layer,
                experts=list(call.routes),
                reason=error.message,
            )
            self._meter.record_fallback(call.rows)
            for expert, route in call.routes.items():
                _add_expert(batch, output, route, self._load(ExpertId(self.layer, expert)))
            return
        self._meter.record_call(call.rows, result, self._function_memory_gb)
        partial = torch.frombuffer(bytearray(result.partial), dtype=torch.float32)
        _add_rows(output, torch.from_numpy(call.rows), partial.view(len(call.rows), -1))


def _add_expert(batch: _Batch, output: torch.Tensor, route: _Route, weights: ExpertWeights) -> None:
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
