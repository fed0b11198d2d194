"""A GPU and the processors beside it, computing experts at the same time.

Hot experts lie on the GPU. The others lie in pinned memory of the host, where the native kernel
reads them, and from where the GPU fetches those that it computes; all of it at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Protocol

import structlog
import torch

from main_model_fn.device_experts import DeviceSum
from main_model_fn.expert_times import measure_times
from main_model_fn.pinned_experts import as_tensors, pinned_copy, slice_of, slices_of
from main_model_fn.placement import Balance, ExpertTimes, Placement, place
from main_model_fn.routes import Batch, Route
from main_model_fn.slots import Slots
from main_model_fn.streaming import ExpertWeights, Staging
from remoe.activation import Activation
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.kernel.interface import RoutedRows
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool

__all__ = ["SPINS_BESIDE_GPU", "Machine", "slices_for"]

_log = structlog.get_logger()
# A token's slices, shared out between CPU and link: one more or less is a few percent of its time.
_AT_ONCE = 16
# About 3 ms: between two layers' experts a GPU computes 0.2 ms, and the threads that had slept then
# read 65 GB/s of weights where those that had not read 90 (16 virtual processors).
SPINS_BESIDE_GPU = 60_000
# From the last copy of one layer's experts to the first of the next one's, if nothing is foretold:
# 0.2 to 0.3 ms, of which the GPU computes half.
_LINK_IDLE_S = 3.5e-4
_ALIGNED = 32  # rows of weights that the kernel takes together


class LayerOfMachine(Protocol):
    """One layer's experts: `hot` are on the GPU, `cold` in pinned memory."""

    @property
    def layer(self) -> int: ...

    @property
    def hot(self) -> Mapping[int, ExpertWeights]: ...

    @property
    def cold(self) -> Mapping[int, ExpertWeights]: ...


class Machine:
    """A GPU and the processors beside it, with the cold experts of a model's layers.

    `read` gives any expert of the checkpoint; those that are held are in `dtype`, each in so many
    `slices`. To the kernel a slice is an expert: the i-th of expert e is `e * slices + i`.
    `computed` counts experts by where they were. `attach` may run beside one thread that computes.
    """

    def __init__(
        self,
        read: Callable[[ExpertId], ExpertTensors],
        pool: NativePool,
        *,
        device: torch.device,
        dtype: torch.dtype,
        activation: Activation,
        slices: int = 1,
    ) -> None:
        self.device = device
        self.activation = activation
        self.slices = slices
        self.pool = pool
        self.kernel = NativeKernel(self._tensors, pool, activation=activation)
        self.times: ExpertTimes | None = None
        self.computed = Counter[str]()
        self._read = read
        self._dtype = dtype
        self._cold: dict[ExpertId, ExpertWeights] = {}
        self._staging: Staging | None = None
        self._sums: torch.Tensor | None = None
        self._like: ExpertWeights | None = None

    def load(self, expert: ExpertId) -> ExpertWeights:
        """Copy an expert from the checkpoint to pinned memory, and let the file's pages go."""
        tensors = self._read(expert)
        pinned = self.device.type == "cuda"
        held = pinned_copy(tensors, self._dtype, slices=self.slices, pinned=pinned)
        for tensor in tensors.all():
            tensor.release()
        return held

    def hold(
        self, experts: Mapping[ExpertId, ExpertWeights], hot: Iterable[ExpertWeights] = ()
    ) -> None:
        """Keep cold experts, beside some hot ones; measures what they take, if nothing did yet."""
        self._cold.update(experts)
        self._like = self._like or next(iter((*experts.values(), *hot)), None)
        for expert in experts:
            self._forget(expert)  # of the mapped file, had it been called there
        if experts and self.times is None:
            self._staging = Staging(next(iter(experts.values())), self.device)
            self.times = measure_times(
                self.kernel, experts, self._staging, self.device, self.activation
            )
            _log.info("expert_times", experts=len(experts), **asdict(self.times))

    def drop(self, experts: Iterable[ExpertId]) -> None:
        for expert in experts:
            self._cold.pop(expert, None)
            self._forget(expert)

    def _forget(self, expert: ExpertId) -> None:
        for part in slices_of(expert, self.slices):
            self.kernel.forget(part)

    def _tensors(self, part: ExpertId) -> ExpertTensors:
        """A slice as the kernel reads it: the copy that is held, or the checkpoint's."""
        index, place = divmod(part.index, self.slices)
        expert = ExpertId(part.layer, index)
        held = self._cold.get(expert)
        if held is not None:
            return as_tensors(held.cut()[place])
        return slice_of(self._read(expert), place, self.slices)

    def routed(
        self, layer: int, batch: Batch, routes: Mapping[int, Route]
    ) -> tuple[list[ExpertId], RoutedRows]:
        """Routes of a layer, by expert, as the kernel takes them: slice by slice."""
        parts = {
            part: route
            for index, route in routes.items()
            for part in slices_of(ExpertId(layer, index), self.slices)
        }
        return list(parts), batch.routed({part.index: route for part, route in parts.items()})

    @property
    def like(self) -> ExpertWeights:
        """One of those that are held, all of one shape; raises ValueError if there is none."""
        if self._like is None:
            raise ValueError("no expert is held here")
        return self._like

    @cached_property
    def slots(self) -> Slots:
        """Room on the GPU for a decoding step's experts."""
        return Slots(self.like.cut()[0], self.device, self.pool)

    def count(self, placed: Placement) -> None:
        self.computed.update(
            cpu=len(placed.cpu), resident=len(placed.resident), streamed=len(placed.streamed)
        )

    def place(self, counts: Mapping[int, int], hot: Mapping[int, ExpertWeights]) -> Placement:
        if self.times is None:  # nothing is cold
            return Placement([], list(counts), [], 0.0)
        return place(counts, hot, self.times)

    @property
    def slices_ahead(self) -> int:
        """How many slices of an expert the link can bring before the next layer has chosen."""
        if self.times is None:
            return 0
        return min(self.slices, round(_LINK_IDLE_S * self.slices / self.times.copy_s))

    def balance(self) -> Balance:
        """To share out decoding steps' slices, as the times measured at start would."""
        if self.times is None:  # nothing is cold
            return Balance(1.0)
        cpu_s = self.times.cpu(1)
        return Balance(cpu_s / (cpu_s + self.times.copy_s))

    def compute(
        self,
        layer: LayerOfMachine,
        placed: Placement,
        total: torch.Tensor,
        batch: Batch,
    ) -> None:
        """Add the placed experts' outputs to `total`, on the device.

        Copies leave first, then the CPU begins beside, and then the GPU is given its work; the host
        waits for the CPU alone.
        """
        self.count(placed)
        staging = self._staging
        waiting = iter(placed.streamed)
        if staging is not None:
            for _, expert in zip(range(staging.room), waiting, strict=False):
                staging.send(layer.cold[expert])
        sums, finish = None, None
        if placed.cpu:
            sums = self._zeros(len(batch.hidden), batch.hidden.shape[1])
            routes = {index: batch.routes[index] for index in placed.cpu}
            parts, rows = self.routed(layer.layer, batch, routes)
            finish = self.kernel.start(parts, rows, sums.numpy())
        try:
            here = DeviceSum(total, batch, self.activation)
            for expert in placed.resident:
                here.add(expert, layer.hot[expert])
            for expert in placed.streamed:
                assert staging is not None  # noqa: S101  # it came with the times
                with staging.take() as weights:
                    here.add(expert, weights)
                following = next(waiting, None)
                if following is not None:
                    staging.send(layer.cold[following])
        finally:
            if finish is not None:
                finish()
        if sums is not None:
            total += sums.to(self.device, non_blocking=True)

    def _zeros(self, rows: int, hidden: int) -> torch.Tensor:
        """Room for the CPU's sums. The last batch's have left it: a batch has waited since."""
        if self._sums is None or len(self._sums) < rows:
            pinned = self.device.type == "cuda"
            with torch.inference_mode(mode=False):  # else none but its own could write to it
                self._sums = torch.empty((rows, hidden), dtype=torch.float32, pin_memory=pinned)
        return self._sums[:rows].zero_()


def slices_for(top_k: int, inner: int) -> int:
    """How many slices to hold experts in: a token's are then about sixteen, if they divide."""
    wanted = -(-_AT_ONCE // top_k)
    return next((n for n in range(wanted, 1, -1) if inner % (n * _ALIGNED) == 0), 1)
