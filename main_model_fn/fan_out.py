"""The remote half of a layer: calls that leave together, replies that are read later.

One call carries each token's row once, whatever number of its experts is remote, and brings back
the gate-weighted sum over them (papers.md A.6, the mitigation of its payload count).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from main_model_fn.express import ExpressLine, RowShape
from main_model_fn.generation_spans import trace_call
from main_model_fn.metering import StepMeter
from main_model_fn.replica_split import SPLIT_FROM_ROUTES, split_over_replicas
from main_model_fn.routes import Batch, CallRows, Route
from main_model_fn.transport import ExpertTransport, PendingReply
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import ExpertCall, RowDtype
from remoe.tracing import Span

__all__ = ["FanOut", "SentCall"]

_log = structlog.get_logger()
# What MessagePack adds: an int32 and a float32 a route; an id and an offset an expert; the rest.
_ROUTE_BYTES = 8
_EXPERT_BYTES = 10
_ENVELOPE_BYTES = 512
_FIRST_TOKEN = np.zeros(1, np.intp)
_ROW_DTYPE: dict[torch.dtype, RowDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True, slots=True)
class SentCall:
    """A call under way: for `rows`, the batch's tokens it carried, and its experts' routes.

    None are all routes of the batch to its experts.
    """

    pending: PendingReply
    rows: NDArray[np.intp]
    experts: list[int]
    routes: dict[int, Route] | None = None
    trace: Span | None = None

    def routes_of(self, batch: Batch) -> dict[int, Route]:
        if self.routes is not None:
            return self.routes
        return {expert: batch.routes[expert] for expert in self.experts}


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
        payload_limit_bytes: int,
    ) -> None:
        self._layer = layer
        self._model_digest = model_digest
        self._transport = transport
        self._function_memory_gb = function_memory_gb
        self._meter = meter
        self._payload_limit_bytes = payload_limit_bytes
        self._line: ExpressLine | None = None
        self._asked = False

    @property
    def beside(self) -> bool:
        """Whether its calls are computed on this machine's processors."""
        return self._transport.beside

    def send(
        self,
        batch: Batch,
        routes: dict[int, Route],
        *,
        deadline_s: float | None = None,
        busy: bool = False,
    ) -> list[SentCall]:
        """Send the batch's rows where `routes`, by expert, says.

        One call; more where the function has replicas and enough to do, or where the payload limit
        asks for it. `deadline_s` is how long from now an answer is of use; `busy` says that the
        caller computes too before it reads the replies.
        """
        dtype = _ROW_DTYPE[batch.hidden.dtype]
        return [
            self._send(self._gather(batch, rows, part), dtype, part, deadline_s, busy=busy)
            for share in self._shares(routes)
            for rows, part in self._within_payload(batch, share)
        ]

    def send_gathered(
        self,
        rows: CallRows,
        dtype: torch.dtype,
        *,
        deadline_s: float | None = None,
        busy: bool = False,
    ) -> SentCall | None:
        """The same of rows that are gathered already; None if one call may not be what they need."""
        size_bytes = max(
            len(rows.hidden) + len(rows.gate) * 2,
            len(rows.hidden) * 4 // dtype.itemsize,
        )
        room = self._payload_limit_bytes - _ENVELOPE_BYTES - len(rows.experts) * _EXPERT_BYTES
        if rows.offsets[-1] >= SPLIT_FROM_ROUTES or size_bytes > room:
            return None
        return self._send(rows, _ROW_DTYPE[dtype], None, deadline_s, busy=busy)

    def _send(
        self,
        rows: CallRows,
        dtype: RowDtype,
        routes: dict[int, Route] | None,
        deadline_s: float | None,
        *,
        busy: bool,
    ) -> SentCall:
        call = self._call(rows, dtype, busy=busy)
        trace = self._meter.trace
        if trace is None:
            pending = self._transport.send(call, deadline_s=deadline_s)
            return SentCall(pending, rows.tokens, rows.experts, routes)
        span = trace.child(
            "experts",
            {
                "remoe.layer": call.layer,
                "remoe.experts": len(call.experts),
                "remoe.rows": call.rows,
            },
        )
        pending = self._transport.send(call, deadline_s=deadline_s, traceparent=span.traceparent)
        return SentCall(pending, rows.tokens, rows.experts, routes, span)

    def line(self, dtype: torch.dtype, width: int, top_k: int) -> ExpressLine | None:
        """The way for calls of one row from within a step, of a model's one kind of rows."""
        if not self._asked:
            shape = RowShape(self._model_digest, _ROW_DTYPE[dtype], width, top_k)
            self._line, self._asked = self._transport.line(self._layer, shape), True
        return self._line

    def book(self, answer: np.void) -> None:
        """Bill a call that left and was answered within the step."""
        result = self._asked_line().result(answer)
        self._meter.record_call(_FIRST_TOKEN, result, self._function_memory_gb)

    def take_over(
        self,
        rows: CallRows,
        dtype: torch.dtype,
        answer: np.void,
        *,
        deadline_s: float | None,
        busy: bool,
    ) -> SentCall:
        """A call of these rows that left within the step, and was not answered there."""
        call = self._call(rows, _ROW_DTYPE[dtype], busy=busy)
        pending = self._asked_line().pending(call, answer, deadline_s=deadline_s)
        return SentCall(pending, rows.tokens, rows.experts)

    def _asked_line(self) -> ExpressLine:
        if self._line is None:
            raise ValueError("the layer's calls have no line")
        return self._line

    def _call(self, rows: CallRows, dtype: RowDtype, *, busy: bool) -> ExpertCall:
        return ExpertCall(
            model_digest=self._model_digest,
            layer=self._layer,
            dtype=dtype,
            rows=len(rows.tokens),
            hidden=rows.hidden,
            experts=rows.experts,
            offsets=rows.offsets,
            row_index=rows.row_index,
            gate=rows.gate,
            beside=busy and self._transport.beside,
            near=self._transport.beside,
        )

    def _shares(self, routes: dict[int, Route]) -> list[dict[int, Route]]:
        if sum(len(route.tokens) for route in routes.values()) < SPLIT_FROM_ROUTES:
            return [routes]
        return split_over_replicas(routes, self._transport.replicas(self._layer))

    def _within_payload(
        self, batch: Batch, routes: dict[int, Route]
    ) -> Iterator[tuple[NDArray[np.intp], dict[int, Route]]]:
        """Tokens in ascending order and their routes, call by call."""
        tokens, width = batch.hidden.shape
        if tokens == 1:
            yield _FIRST_TOKEN, routes
            return
        carried = np.zeros(tokens, np.bool_)
        for route in routes.values():
            carried[route.tokens] = True
        needed = carried.nonzero()[0]
        # The larger of a token's row with its routes there, and its float32 row back.
        top_k = batch.gates.shape[1]
        row_bytes = max(width * batch.hidden.element_size() + top_k * _ROUTE_BYTES, width * 4)
        room = self._payload_limit_bytes - _ENVELOPE_BYTES - len(routes) * _EXPERT_BYTES
        most = max(1, room // row_bytes)
        if len(needed) <= most:
            yield needed, routes
            return
        for start in range(0, len(needed), most):
            rows = needed[start : start + most]
            parts = {expert: r.of_tokens(rows[0], rows[-1]) for expert, r in routes.items()}
            yield rows, {expert: part for expert, part in parts.items() if len(part.tokens)}

    @staticmethod
    def _gather(batch: Batch, rows: NDArray[np.intp], routes: dict[int, Route]) -> CallRows:
        routed = batch.routed(routes)
        whole = len(rows) == len(routed.hidden)
        row_index = routed.row_index if whole else rows.searchsorted(routed.row_index)
        return CallRows(
            tokens=rows,
            hidden=(routed.hidden if whole else routed.hidden[rows]).tobytes(),
            experts=list(routes),
            offsets=list(routed.offsets),
            row_index=row_index.astype("<i4", copy=False).tobytes(),
            gate=routed.gate.astype("<f4", copy=False).tobytes(),
        )

    def receive(self, call: SentCall) -> bytes | None:
        """Partial sums, float32 [rows of the call, hidden]; None if the function is lost.

        The caller then computes the call's routes itself: the answer stays the model's own.
        """
        try:
            result = call.pending.result()
        except ExpertUnavailableError as error:
            _log.warning(
                "expert_computed_locally",
                layer=self._layer,
                experts=call.experts,
                reason=error.message,
            )
            self._meter.record_fallback(call.rows)
            if call.trace is not None:
                call.trace.fail(error.code or error.type)
                call.trace.end()
            return None
        if call.trace is not None:
            trace_call(call.trace, result)
        self._meter.record_call(call.rows, result, self._function_memory_gb)
        return result.partial
