"""Experts that the GPU computes for a decoding step's few rows: copied to a slot, wherever they lie.

A slot's memory never moves, so what computes it is a CUDA graph: one launch an expert. Copying one
within the GPU's memory takes less than the launches that this saves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from main_model_fn.cuda_calls import CopyLane, wait_for_count
from main_model_fn.device_experts import expert_output
from main_model_fn.exchange import Exchange
from main_model_fn.host_memory import host_empty, seen_by_gpu
from main_model_fn.segments import Segments, segments
from main_model_fn.streaming import ExpertWeights
from remoe.activation import Activation
from remoe.kernel.native_library import NativePool

__all__ = ["Slots", "SlotsOf"]


class _Lane(Protocol):
    """How a slot is filled and computed."""

    def free(self, slot: int) -> None:
        """Wait until a slot may be filled."""
        ...

    def done(self, slot: int) -> bool:
        """The same without waiting."""
        ...

    def send(self, slot: int, weights: ExpertWeights) -> None:
        """Begin to fill it."""
        ...

    def compute(self, slot: int, made: Segments) -> None:
        """Have it computed once it is filled."""
        ...

    def wait_for_cpu(self) -> None:
        """Let what is asked for from now on wait for what was begun beside."""
        ...


class _AtOnce:
    """Without a GPU: each step when it is asked for."""

    def __init__(self, slots: list[ExpertWeights]) -> None:
        self._slots = slots

    def free(self, slot: int) -> None: ...

    def done(self, slot: int) -> bool:
        return True

    def send(self, slot: int, weights: ExpertWeights) -> None:
        for to, piece in zip(self._slots[slot].pieces(), weights.pieces(), strict=True):
            to.copy_(piece)

    def compute(self, slot: int, made: Segments) -> None:
        made.run()

    def wait_for_cpu(self) -> None: ...  # the host does


class _Cuda:
    """Copies on a stream beside the current one, which the launches are on."""

    def __init__(self, slots: list[ExpertWeights], device: torch.device, pool: NativePool) -> None:
        self._lane = CopyLane(device, len(slots))
        self._device = device
        self._pool = pool
        ended = pool.ended
        if ended is None:
            ended = host_empty((1,), torch.int32, pinned=True).numpy()
            pool.tell(ended)
        self._ended: int = ended.ctypes.data
        self._slots = [[(p.data_ptr(), p.nbytes) for p in slot.pieces()] for slot in slots]

    def free(self, slot: int) -> None:
        self._lane.free(slot)

    def done(self, slot: int) -> bool:
        return self._lane.done(slot)

    def send(self, slot: int, weights: ExpertWeights) -> None:
        for (to, size_bytes), piece in zip(self._slots[slot], weights.pieces(), strict=True):
            self._lane.copy(slot, to, piece.data_ptr(), size_bytes)

    def compute(self, slot: int, made: Segments) -> None:
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        self._lane.arrived(slot, stream)
        made.run()
        self._lane.used(slot, stream)

    def wait_for_cpu(self) -> None:
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        wait_for_count(stream, self._ended, self._pool.begun)


class Slots:
    """Room for so many experts (or slices of one size) on a device, used by turns, by one thread.

    `gates` float32 [count, most_rows], of each one's rows, lie on the host.
    """

    def __init__(
        self,
        like: ExpertWeights,
        device: torch.device,
        pool: NativePool,
        *,
        count: int = 16,
        most_rows: int = 16,
    ) -> None:
        self.device = device
        self.weights = [like.empty_like(device) for _ in range(count)]
        for held in self.weights:
            for piece in held.pieces():
                piece.zero_()  # a graph is tried on it
        pinned = device.type == "cuda"
        gates = host_empty((count, most_rows), torch.float32, pinned=pinned).zero_()
        self.gates, self.gates_there = gates.numpy(), seen_by_gpu(gates, device)
        self.lane: _Lane = _Cuda(self.weights, device, pool) if pinned else _AtOnce(self.weights)
        self._turn = self._ready = 0

    def ready(self, count: int) -> None:
        """Wait until the next so many may be filled, which `send` then need not."""
        self._ready = min(count, len(self.weights))
        for later in range(self._ready):
            self.lane.free((self._turn + later) % len(self.weights))

    def send(self, weights: ExpertWeights) -> int:
        """Begin to copy an expert to the slot returned, whose gates may be written from now on."""
        slot = self._turn
        self._turn = (slot + 1) % len(self.weights)
        if self._ready:
            self._ready -= 1
        else:
            self.lane.free(slot)
        self.lane.send(slot, weights)
        return slot


class SlotsOf:
    """What computes each slot for the rows of one exchange, adding to its total."""

    def __init__(self, slots: Slots, exchange: Exchange, activation: Activation) -> None:
        self._slots = slots
        rows = len(exchange.rows)

        def forward(slot: int) -> torch.Tensor:
            output = expert_output(exchange.rows, slots.weights[slot], activation)
            return exchange.total.add_(output * slots.gates_there[slot, :rows, None])

        self._passes = [
            segments(lambda _cut, slot=slot: forward(slot), slots.device)  # type: ignore[misc]
            for slot in range(len(slots.weights))
        ]

    def add(
        self,
        experts: Sequence[ExpertWeights],
        gates: Callable[[int], NDArray[np.float32] | float],
        *,
        ahead: Sequence[int] = (),
        unwanted: int = 0,
        following: Callable[[], Sequence[ExpertWeights]] = tuple,
    ) -> tuple[int | None, list[int]]:
        """Have some computed, by their rows' `gates` of each number; the slot of the last one.

        Before `experts` come those in the slots `ahead`, that the last call returned for its
        `following`, of which some were `unwanted`. As many copies as there is room for are asked
        for before anything is computed; `following` is called when those of `experts` are.
        """
        slots, sent, later = self._slots, deque(enumerate(ahead)), list[int]()
        last = ahead[-1] if ahead else None
        room = len(slots.weights) - unwanted

        def compute(number: int, slot: int) -> None:
            slots.gates[slot] = gates(number)
            slots.lane.compute(slot, self._passes[slot])

        for number, weights in enumerate(experts, len(ahead)):
            if len(sent) == room:
                compute(*sent.popleft())
            last = slots.send(weights)
            sent.append((number, last))
        for weights in following()[: len(slots.weights) // 2]:
            if len(sent) + len(later) == room:
                compute(*sent.popleft())
            later.append(slots.send(weights))
        for one in sent:
            compute(*one)
        return last, later
