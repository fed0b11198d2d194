"""Who used what: routes, calls and seconds of each engine step, shared out to its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from main_model_fn.transport import RemoteResult
from remoe.ledger import Ledger
from remoe.tracing import Span as TraceSpan

__all__ = ["RequestMeter", "Span", "StepMeter"]


@dataclass(slots=True)
class RequestMeter:
    """Running totals of one request; route counts are int64 [layers, experts].

    `deadline_at` is when nobody waits for it any more, on the clock of `time.monotonic`; `trace`
    is its place in a trace, if it is in one.
    """

    prefill_counts: NDArray[np.int64]
    decode_counts: NDArray[np.int64]
    ledger: Ledger = field(default_factory=Ledger)
    first_step_at: float | None = None
    deadline_at: float | None = None
    trace: TraceSpan | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one request in a step, in batch order.

    The first `repeated` of them were computed before (their cache had to make room), and are
    billed but not counted; then `prefill` are of the prompt, and the others were generated.
    """

    meter: RequestMeter
    rows: int
    repeated: int = 0
    prefill: int = 0


class StepMeter:
    """Shares what a step uses among its requests: the layout of the step under way.

    `main_memory_gb` is what is billed, and `gpu_memory_gb` as much of it as is on a GPU.
    Only rows that are computed are known here: those whose cache another request had already
    filled are neither billed nor counted as activation. Everything but `open` is called from the
    engine's thread.
    """

    def __init__(
        self, *, layers: int, experts: int, main_memory_gb: float, gpu_memory_gb: float = 0.0
    ) -> None:
        self._shape = (layers, experts)
        self.main_memory_gb = main_memory_gb
        self.gpu_memory_gb = gpu_memory_gb
        self._step: list[Span] = []
        self._owner: NDArray[np.intp] = np.zeros(0, np.intp)
        self._began_at = 0.0
        self.trace: TraceSpan | None = None
        """Where calls of the step under way belong: to the first of its requests in a trace."""

    def open(
        self, deadline_at: float | None = None, trace: TraceSpan | None = None
    ) -> RequestMeter:
        """A new request's meter."""
        prefill, decode = np.zeros(self._shape, np.int64), np.zeros(self._shape, np.int64)
        return RequestMeter(prefill, decode, deadline_at=deadline_at, trace=trace)

    def begin_step(self, spans: list[Span], now: float) -> None:
        """Note which rows of the coming forward pass belong to whom; `now` in seconds."""
        self._began_at = now
        self._step = spans
        self.trace = next((span.meter.trace for span in spans if span.meter.trace), None)
        self._owner = np.repeat(np.arange(len(spans)), [span.rows for span in spans])  # [rows]
        for span in spans:
            if span.meter.first_step_at is None:
                span.meter.first_step_at = now

    def remaining_s(self, now: float) -> float | None:
        """How long the most patient of the step's requests still waits; None if one has no limit.

        What is computed for all of them together, such as a remote call, may take so long.
        """
        deadlines = [span.meter.deadline_at for span in self._step]
        limited = [deadline for deadline in deadlines if deadline is not None]
        if not limited or len(limited) < len(deadlines):
            return None
        return max(limited) - now

    def end_step(self, now: float) -> None:
        """Bill the step's seconds of main memory in equal parts to its requests."""
        if not self._step:
            return
        share_s = (now - self._began_at) / len(self._step)
        gpu_gb = min(self.gpu_memory_gb, self.main_memory_gb)
        for span in self._step:
            span.meter.ledger.main_gpu_gb_s += share_s * gpu_gb
            span.meter.ledger.main_cpu_gb_s += share_s * (self.main_memory_gb - gpu_gb)

    def record_routes(self, layer: int, top_k_index: NDArray[np.int64]) -> None:
        """Count the routes of one layer; `top_k_index` is [rows, top_k]."""
        self.record_all_routes([layer], top_k_index[None])

    def record_all_routes(self, layers: Sequence[int], top_k_index: NDArray[np.int64]) -> None:
        """Count the routes of some layers; `top_k_index` is [layers, rows, top_k]."""
        size = self._shape[0] * self._shape[1]
        places = np.asarray(layers)[:, None, None] * self._shape[1] + top_k_index
        start = 0
        for span in self._step:
            routes = places[:, start + span.repeated : start + span.rows]
            start += span.rows
            for counts, part in (
                (span.meter.prefill_counts, routes[:, : span.prefill]),
                (span.meter.decode_counts, routes[:, span.prefill :]),
            ):
                if part.size:
                    counts[:] += np.bincount(part.ravel(), minlength=size).reshape(self._shape)

    def record_call(self, rows: NDArray[np.intp], result: RemoteResult, memory_gb: float) -> None:
        """Share one remote call among the requests whose rows it carried, by their rows."""
        for meter, share, count in self._shares(rows):
            ledger = meter.ledger
            ledger.remote_calls += 1
            ledger.remote_rows += count
            ledger.remote_bytes += round(result.bytes_moved * share)
            ledger.remote_gb_s += result.busy_s * memory_gb * share
            ledger.remote_cold_start_s += result.cold_start_s
            ledger.remote_retries += result.retries
            ledger.remote_hedges += result.hedges

    def record_fallback(self, rows: NDArray[np.intp]) -> None:
        for meter, _, _ in self._shares(rows):
            meter.ledger.local_fallbacks += 1

    def _shares(self, rows: NDArray[np.intp]) -> list[tuple[RequestMeter, float, int]]:
        if len(self._step) < 2:
            return [(span.meter, 1.0, len(rows)) for span in self._step]
        counts = np.bincount(self._owner[rows], minlength=len(self._step))
        return [
            (span.meter, count / len(rows), int(count))
            for span, count in zip(self._step, counts.tolist(), strict=True)
            if count
        ]
