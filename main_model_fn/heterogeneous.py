"""Local experts with a GPU: each is computed where it ends first (placement.py).

Hot experts lie on the GPU. The others lie in pinned memory of the host, where the native kernel
reads them, and from where the GPU fetches those that it computes; all of it at the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from main_model_fn.device_experts import DeviceSum
from main_model_fn.expert_times import measure_times
from main_model_fn.host_memory import host_empty
from main_model_fn.local_experts import ExpertsModule
from main_model_fn.placement import ExpertTimes, Placement, place
from main_model_fn.routes import Batch, Route
from main_model_fn.streaming import ExpertWeights, Staging
from remoe.activation import Activation
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool
from remoe.mapped import MappedTensor

__all__ = ["HeterogeneousExperts", "Machine"]

_log = structlog.get_logger()
_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, slots=True)
class _HeterogeneousResidents:
    """One layer's: `hot` are on the GPU, `cold` in pinned memory."""

    machine: Machine
    layer: int
    hot: Mapping[int, ExpertWeights]
    cold: Mapping[int, ExpertWeights]

    @property
    def experts(self) -> frozenset[int]:
        return frozenset(self.hot) | frozenset(self.cold)

    def add(
        self, total: torch.Tensor, module: ExpertsModule, batch: Batch, *, beside: bool = False
    ) -> None:
        counts = {e: n for e, n in batch.counts.items() if e in self.hot or e in self.cold}
        self.machine.compute(self, self.machine.place(counts, self.hot), total, batch)


class Machine:
    """A GPU and the processors beside it, with the cold experts of a model's layers.

    `read` gives any expert of the checkpoint; those that are held are in `dtype`. `computed` counts
    experts by where they were. `attach` may run beside one thread that computes.
    """

    def __init__(
        self,
        read: Callable[[ExpertId], ExpertTensors],
        pool: NativePool,
        *,
        device: torch.device,
        dtype: torch.dtype,
        activation: Activation,
    ) -> None:
        self.device = device
        self.activation = activation
        self.kernel = NativeKernel(self._tensors, pool, activation=activation)
        self.times: ExpertTimes | None = None
        self.computed = Counter[str]()
        self._read = read
        self._dtype = dtype
        self._cold: dict[ExpertId, ExpertWeights] = {}
        self._staging: Staging | None = None
        self._sums: torch.Tensor | None = None

    def load(self, expert: ExpertId) -> ExpertWeights:
        """Copy an expert out of the checkpoint into pinned memory, and let the file's pages go."""
        tensors = self._read(expert)
        inner, hidden = tensors.gate.values.shape
        held = self.empty(inner, hidden, biased=tensors.gate_bias is not None)
        _copy_into(held.gate_up[:inner], tensors.gate)
        _copy_into(held.gate_up[inner:], tensors.up)
        _copy_into(held.down, tensors.down)
        if held.gate_up_bias is not None and held.down_bias is not None:
            biases = [tensors.gate_bias, tensors.up_bias, tensors.down_bias]
            gate, up, down = (b.to_float32() for b in biases if b is not None)
            held.gate_up_bias.copy_(torch.from_numpy(np.concatenate([gate, up])))
            held.down_bias.copy_(torch.from_numpy(down))
        for tensor in tensors.all():
            tensor.release()
        return held

    def empty(self, inner: int, hidden: int, *, biased: bool = False) -> ExpertWeights:
        """Room for an expert in memory that the GPU can fetch from."""

        def room(*shape: int) -> torch.Tensor:
            return host_empty(shape, self._dtype, pinned=self.device.type == "cuda")

        biases = (room(2 * inner), room(hidden)) if biased else (None, None)
        return ExpertWeights(room(2 * inner, hidden), room(hidden, inner), *biases)

    def hold(self, experts: Mapping[ExpertId, ExpertWeights]) -> None:
        """Keep cold experts; measures what they take, if nothing did before."""
        self._cold.update(experts)
        for expert in experts:
            self.kernel.forget(expert)  # of the mapped file, had it been called there
        if experts and self.times is None:
            self._staging = Staging(next(iter(experts.values())), self.device)
            self.times = measure_times(
                self.kernel, experts, self._staging, self.device, self.activation
            )
            _log.info("expert_times", experts=len(experts), **asdict(self.times))

    def drop(self, experts: Iterable[ExpertId]) -> None:
        for expert in experts:
            self._cold.pop(expert, None)
            self.kernel.forget(expert)

    def _tensors(self, expert: ExpertId) -> ExpertTensors:
        """An expert as the kernel reads it: the copy that is held, or the checkpoint's."""
        held = self._cold.get(expert)
        return self._read(expert) if held is None else as_tensors(held)

    def place(self, counts: Mapping[int, int], hot: Mapping[int, ExpertWeights]) -> Placement:
        if self.times is None:  # nothing is cold
            return Placement([], list(counts), [], 0.0)
        return place(counts, hot, self.times)

    def compute(
        self,
        layer: _HeterogeneousResidents,
        placed: Placement,
        total: torch.Tensor,
        batch: Batch,
    ) -> None:
        """Add the placed experts' outputs to `total`, on the device.

        Copies leave first, then the CPU begins beside, and then the GPU is given its work; the host
        waits for the CPU alone.
        """
        self.computed.update(
            cpu=len(placed.cpu), resident=len(placed.resident), streamed=len(placed.streamed)
        )
        staging = self._staging
        waiting = iter(placed.streamed)
        if staging is not None:
            for _, expert in zip(range(staging.room), waiting, strict=False):
                staging.send(layer.cold[expert])
        sums, finish = None, None
        if placed.cpu:
            sums = self._zeros(len(batch.hidden), batch.hidden.shape[1])
            experts = [ExpertId(layer.layer, index) for index in placed.cpu]
            rows = batch.routed({index: batch.routes[index] for index in placed.cpu})
            finish = self.kernel.start(experts, rows, sums.numpy())
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
            self._sums = torch.empty((rows, hidden), dtype=torch.float32, pin_memory=pinned)
        return self._sums[:rows].zero_()


class HeterogeneousExperts:
    """One layer's experts on a machine; those of `hottest` go to the GPU when they are attached."""

    def __init__(self, layer: int, machine: Machine, hottest: frozenset[int] = frozenset()) -> None:
        self._layer = layer
        self._machine = machine
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
        machine = self._machine
        experts = [ExpertId(self._layer, index) for index in routes]
        sums = machine.kernel.weighted_sum(experts, batch.routed(routes))
        total += torch.from_numpy(sums).to(total.device)
        machine.drop(e for e in experts if e.index not in self.residents.experts)

    def attach(self, experts: Iterable[int]) -> None:
        new = frozenset(experts) - self.residents.experts
        machine = self._machine
        loaded = {index: machine.load(ExpertId(self._layer, index)) for index in sorted(new)}
        hot = {i: w.to(machine.device) for i, w in loaded.items() if i in self._hottest}
        self.adopt(hot, {i: w for i, w in loaded.items() if i not in hot})

    def adopt(self, hot: Mapping[int, ExpertWeights], cold: Mapping[int, ExpertWeights]) -> None:
        """Make experts resident whose weights are where they belong already."""
        self._machine.hold({ExpertId(self._layer, index): w for index, w in cold.items()})
        held = self.residents
        self.residents = self._of({**held.hot, **hot}, {**held.cold, **cold})

    def detach(self, experts: Iterable[int]) -> None:
        unwanted, held = frozenset(experts), self.residents
        hot = {i: w for i, w in held.hot.items() if i not in unwanted}
        cold = {i: w for i, w in held.cold.items() if i not in unwanted}
        self.residents = self._of(hot, cold)
        self._machine.drop(ExpertId(self._layer, index) for index in unwanted)

    def _of(
        self, hot: Mapping[int, ExpertWeights], cold: Mapping[int, ExpertWeights]
    ) -> _HeterogeneousResidents:
        return _HeterogeneousResidents(self._machine, self._layer, hot, cold)


def as_tensors(weights: ExpertWeights) -> ExpertTensors:
    """The same memory, as the kernel takes it."""
    inner = weights.down.shape[1]

    def tensor(part: torch.Tensor) -> MappedTensor:
        values: NDArray[np.generic] = (
            part.view(torch.uint16) if part.dtype == torch.bfloat16 else part
        ).numpy()
        return MappedTensor(values, _STORED[part.dtype])

    matrices = (weights.gate_up[:inner], weights.gate_up[inner:], weights.down)
    if weights.gate_up_bias is None or weights.down_bias is None:
        return ExpertTensors(*(tensor(part) for part in matrices))
    biases = (weights.gate_up_bias[:inner], weights.gate_up_bias[inner:], weights.down_bias)
    return ExpertTensors(*(tensor(part) for part in (*matrices, *biases)))


def _copy_into(to: torch.Tensor, stored: MappedTensor) -> None:
    copy = torch.from_numpy(np.array(stored.values))
    to.copy_(copy.view(torch.bfloat16) if stored.dtype == "BF16" else copy)
