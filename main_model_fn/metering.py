"""Who used what: routes, calls and seconds of each engine step, shared out to its requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from main_model_fn.transport import RemoteResult
from remoe.ledger import Ledger

__all__ = ["RequestMeter", "Span", "StepMeter"]


@dataclass(slots=True)
class RequestMeter:
    """Running totals of one request; route counts are int64 [layers, experts]."""

    prefill_counts: NDArray[np.int64]
    decode_counts: NDArray[np.int64]
    ledger: Ledger = field(default_factory=Ledger)
    first_step_at: float | None = None

    @classmethod
    def empty(cls, layers: int, experts: int) -> RequestMeter:
        shape = (layers, experts)
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64))


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one request in a step, in batch order."""

    request_id: str
    rows: int
    prefill: bool


class StepMeter:
    """Meters of all admitted requests, and the layout of the step under way.

    Everything but `open` and `close` is called from the engine's thread.
    """

    def __init__(self, *, layers: int, experts: int, main_memory_gb: float, on_gpu: bool) -> None:
        self._shape = (layers, experts)
        self.main_memory_gb = main_memory_gb
        self._on_gpu = on_gpu
        self._meters: dict[str, RequestMeter] = {}
        self._step: list[tuple[RequestMeter, Span]] = []
        self._owner: NDArray[np.intp] = np.zeros(0, np.intp)
        self._began_at = 0.0

    def open(self, request_id: str) -> RequestMeter:
        meter = self._meters[request_id] = RequestMeter.empty(*self._shape)
        return meter

    def close(self, request_id: str) -> None:
        self._meters.pop(request_id, None)

    def begin_step(self, spans: list[Span], now: float) -> None:
        """Note which rows of the coming forward pass belong to whom; `now` in seconds."""
        self._began_at = now
        self._step = [
            (self._meters.get(span.request_id) or RequestMeter.empty(*self._shape), span)
            for span in spans
        ]
        self._owner = np.repeat(np.arange(len(spans)), [span.rows for span in spans])  # [rows]
        for meter, _ in self._step:
            if meter.first_step_at is None:
                meter.first_step_at = now

    def end_step(self, now: float) -> None:
        """Bill the step's seconds of main memory in equal parts to its requests."""
        if not self._step:
            return
        share_gb_s = (now - self._began_at) * self.main_memory_gb / len(self._step)
        for meter, _ in self._step:
            if self._on_gpu:
                meter.ledger.main_gpu_gb_s += share_gb_s
            else:
                meter.ledger.main_cpu_gb_s += share_gb_s

    def record_routes(self, layer: int, top_k_index: NDArray[np.int64]) -> None:
        """Count the routes of one layer; `top_k_index` is [rows, top_k]."""
        start = 0
        for meter, span in self._step:
            routes = top_k_index[start : start + span.rows]
            counts = meter.prefill_counts if span.prefill else meter.decode_counts
            counts[layer] += np.bincount(routes.ravel(), minlength=counts.shape[1])
            start += span.rows

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

    def record_fallback(self, rows: NDArray[np.intp]) -> None:
        for meter, _, _ in self._shares(rows):
            meter.ledger.local_fallbacks += 1

    def _shares(self, rows: NDArray[np.intp]) -> list[tuple[RequestMeter, float, int]]:
        if not self._step:
            return []
        counts = np.bincount(self._owner[rows], minlength=len(self._step))
        return [
            (meter, count / len(rows), int(count))
            for (meter, _), count in zip(self._step, counts.tolist(), strict=True)
            if count
        ]
