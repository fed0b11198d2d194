"""The remote half of a layer: calls that leave together, replies that are read later.

One call carries each token's row once, whatever number of its experts is remote, and brings back
the gate-weighted sum over them (papers.md A.6, the mitigation of its payload count).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from main_model_fn.metering import StepMeter
from main_model_fn.routes import Route
from main_model_fn.transport import ExpertTransport, PendingReply
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import MAX_BODY_BYTES, ExpertCall, RowDtype

__all__ = ["FanOut", "SentCall"]

_log = structlog.get_logger()
_ROW_DTYPE: dict[torch.dtype, RowDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True, slots=True)
class SentCall:
    """A call under way: for `rows`, the batch's tokens it carried, and its experts' routes."""

    pending: PendingReply
    rows: NDArray[np.intp]
    routes: dict[int, Route]


class FanOut:
    """The calls of one layer to its expert function."""

    def __init__(
        self,
        *,
        layer: int,
        model_digest: str,
        transport: ExpertTransport,
        function_memory_gb: float,
        meter: StepMeter,
    ) -> None:
        self._layer = layer
        self._model_digest = model_digest
        self._transport = transport
        self._function_memory_gb = function_memory_gb
        self._meter = meter

    def send(
        self, hidden: torch.Tensor, gates: torch.Tensor, routes: dict[int, Route]
    ) -> list[SentCall]:
        """Send `hidden` [tokens, hidden] where `routes`, by expert, says; `gates` [tokens, top_k].

        One call, or more where the payload limit asks for it.
        """
        gate_weights = gates.float().cpu().numpy()  # [tokens, top_k]
        needed = np.unique(np.concatenate([route.tokens for route in routes.values()]))
        # The reply, float32 whatever the request's dtype, is the larger half.
        rows_per_call = max(1, (MAX_BODY_BYTES - 65_536) // (4 * hidden.shape[1]))
        calls = []
        for start in range(0, len(needed), rows_per_call):
            rows = needed[start : start + rows_per_call]
            inside_routes = {}
            for expert, (tokens, slots) in routes.items():
                inside = (tokens >= rows[0]) & (tokens <= rows[-1])
                if inside.any():
                    inside_routes[expert] = Route(tokens[inside], slots[inside])
            call = self._build_call(hidden, gate_weights, rows, inside_routes)
            calls.append(SentCall(self._transport.send(call), rows, inside_routes))
        return calls

    def _build_call(
        self,
        hidden: torch.Tensor,
        gates: NDArray[np.float32],
        rows: NDArray[np.intp],
        routes: dict[int, Route],
    ) -> ExpertCall:
        picked = hidden[torch.from_numpy(rows).to(hidden.device)].cpu()  # [rows, hidden]
        tokens = np.concatenate([route.tokens for route in routes.values()])
        slots = np.concatenate([route.slots for route in routes.values()])
        offsets = np.cumsum([len(route.tokens) for route in routes.values()])
        return ExpertCall(
            model_digest=self._model_digest,
            layer=self._layer,
            dtype=_ROW_DTYPE[hidden.dtype],
            rows=len(rows),
            hidden=picked.contiguous().view(torch.uint8).numpy().tobytes(),
            experts=list(routes),
            offsets=[0, *offsets.tolist()],
            row_index=np.searchsorted(rows, tokens).astype("<i4").tobytes(),
            gate=gates[tokens, slots].astype("<f4").tobytes(),
        )

    def receive(self, call: SentCall) -> torch.Tensor | None:
        """Partial sums, float32 [rows of the call, hidden]; None if the function is lost.

        The caller then computes the call's routes itself: the answer stays the model's own.
        """
        try:
            result = call.pending.result()
        except ExpertUnavailableError as error:
            _log.warning(
                "expert_computed_locally",
                layer=self._layer,
                experts=list(call.routes),
                reason=error.message,
            )
            self._meter.record_fallback(call.rows)
            return None
        self._meter.record_call(call.rows, result, self._function_memory_gb)
        partial = torch.frombuffer(bytearray(result.partial), dtype=torch.float32)
        return partial.view(len(call.rows), -1)
