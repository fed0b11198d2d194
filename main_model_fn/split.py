"""One MoE layer split in two: resident experts here, the others behind a transport.

Registered with transformers' experts registry, so that attention, router, norms and shared
experts stay the library's own for every family (papers.md A.2; peers-and-conventions 6.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch

from main_model_fn.express import ExpressLine
from main_model_fn.fan_out import FanOut, SentCall
from main_model_fn.local_experts import ExpertsModule, LocalExperts
from main_model_fn.metering import StepMeter
from main_model_fn.native_stop import Stop
from main_model_fn.routes import Batch
from main_model_fn.transport import ExpertTransport
from remoe.checkpoint import Checkpoint
from remoe.experts import Partition

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "LayerExperts",
    "SplitLayers",
    "SplitModule",
    "split_experts_forward",
]

EXPERTS_IMPLEMENTATION = "remoe_split"


class SplitModule(ExpertsModule, Protocol):
    """A model's experts module, with the experts that it has now."""

    remoe: LayerExperts


class LayerExperts:
    """The split experts of one layer."""

    def __init__(
        self, *, layer: int, local: LocalExperts, fan_out: FanOut, meter: StepMeter
    ) -> None:
        self.layer = layer
        self.local = local
        self._fan_out = fan_out
        self._meter = meter
        # Told what the experts are given: input [tokens, hidden] and routes [tokens, top_k].
        self.observe: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None

    @property
    def beside(self) -> bool:
        """Whether its remote experts are computed on this machine's processors."""
        return self._fan_out.beside

    def line(self, dtype: torch.dtype, width: int, top_k: int) -> ExpressLine | None:
        """For its calls of one row from within a native step."""
        return self._fan_out.line(dtype, width, top_k)

    def book(self, answer: np.void) -> None:
        """Bill a call that left and was answered within a step."""
        self._fan_out.book(answer)

    def forward(
        self,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum over the routed experts; all tensors are [tokens, ...], output like hidden."""
        batch = Batch.of(hidden, top_k_index, top_k_weights)
        self._meter.record_routes(self.layer, batch.index.numpy())
        if self.observe is not None:
            self.observe(self.layer, hidden, batch.index)
        return self.compute(module, batch)

    def compute(self, module: ExpertsModule, batch: Batch) -> torch.Tensor:
        """The same of routes that are already counted.

        Remote calls leave first, local experts are computed while they fly.
        """
        hidden = batch.hidden
        residents = self.local.residents  # once: they may change while this batch is computed
        sent = []
        if remote := sorted(batch.experts - residents.experts):
            routes = {expert: batch.routes[expert] for expert in remote}
            deadline_s = self._meter.remaining_s(time.monotonic())
            busy = len(remote) < len(batch.experts)
            sent = self._fan_out.send(batch, routes, deadline_s=deadline_s, busy=busy)
        total = self.local.new_sum(hidden)
        if len(remote) < len(batch.experts):
            residents.add(total, module, batch, beside=bool(remote) and self.beside)
        for call in sent:
            self._add_remote(total, module, batch, call)
        return total.to(hidden.dtype)

    def answer(self, module: ExpertsModule, stop: Stop) -> None:
        """The same where the kernel stopped among its layers, into the stop's sum."""
        if self.observe is not None:
            batch = stop.batch()
            self.observe(self.layer, batch.hidden.clone(), batch.index.clone())
        rows = stop.elsewhere()
        if rows is None:
            stop.compute_here()
            return
        deadline_s = self._meter.remaining_s(time.monotonic())
        busy, posted = stop.some_here, stop.posted
        if posted is not None:
            call: SentCall | None = self._fan_out.take_over(
                rows, stop.dtype, posted, deadline_s=deadline_s, busy=busy
            )
        else:
            call = self._fan_out.send_gathered(rows, stop.dtype, deadline_s=deadline_s, busy=busy)
        if call is None:
            batch = stop.batch()
            routes = {expert: batch.routes[expert] for expert in rows.experts}
            sent = self._fan_out.send(batch, routes, deadline_s=deadline_s, busy=busy)
            stop.compute_here()
            for part in sent:
                self._add_remote(stop.total, module, batch, part)
            return
        if posted is None:
            stop.compute_here()
        partial = self._fan_out.receive(call)
        if partial is None:
            batch = stop.batch()
            self.local.add_lost(stop.total, module, batch, call.routes_of(batch))
        else:
            stop.add(partial)

    def _add_remote(
        self, total: torch.Tensor, module: ExpertsModule, batch: Batch, call: SentCall
    ) -> None:
        """Add the returned partial sums, or compute them here if the function is lost."""
        partial = self._fan_out.receive(call)
        if partial is None:
            self.local.add_lost(total, module, batch, call.routes_of(batch))
            return
        rows = torch.frombuffer(bytearray(partial), dtype=torch.float32)
        rows = rows.view(len(call.rows), -1).to(total.device, total.dtype)
        if len(total) == 1:
            total += rows
        else:
            total[torch.from_numpy(call.rows).to(total.device)] += rows


class SplitLayers:
    """Makes the split experts of a model's layers, as a partition says."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        partition: Partition,
        new_local: Callable[[int], LocalExperts],
        *,
        transport: ExpertTransport,
        function_memory_gb: Mapping[int, float],
        meter: StepMeter,
        payload_limit_bytes: int,
    ) -> None:
        self._partition, self._new_local, self._meter = partition, new_local, meter

        def fan_out(layer: int) -> FanOut:
            return FanOut(
                layer=layer,
                model_digest=checkpoint.digest,
                transport=transport,
                function_memory_gb=function_memory_gb[layer],
                meter=meter,
                payload_limit_bytes=payload_limit_bytes,
            )

        self._fan_out = fan_out

    def layer(self, layer: int) -> LayerExperts:
        """One layer's, its resident experts in memory."""
        local = self._new_local(layer)
        local.attach(self._partition.local(layer))
        return LayerExperts(
            layer=layer, local=local, fan_out=self._fan_out(layer), meter=self._meter
        )


def split_experts_forward(
    self: SplitModule,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The function registered with transformers; `self` is the model's experts module."""
    return self.remoe.forward(self, hidden_states, top_k_index, top_k_weights)
