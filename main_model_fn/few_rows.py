"""A layer's local experts for the few rows of a decoding step, in as few steps as the host can.

What the CPU computes begins as soon as the router's choice is known; then copies and the GPU's part
are asked for while it runs. The arguments of both lie where they always do.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from main_model_fn.exchange import Exchange
from main_model_fn.native_dtypes import KERNEL_DTYPES
from main_model_fn.placement import Placement
from main_model_fn.slots import SlotsOf
from remoe.kernel.native_library import Matrix, Routed

if TYPE_CHECKING:
    from main_model_fn.heterogeneous import HeterogeneousResidents
    from main_model_fn.machine import Machine

__all__ = ["FewRows"]


class FewRows:
    """For the rows of one exchange. Slices are numbered as the kernel knows them.

    `prepare` and `finish` are called while the GPU is busy without the host; it waits for `begin`.
    """

    def __init__(self, machine: Machine, exchange: Exchange) -> None:
        self._machine = machine
        self._parts, self._gates = exchange.parts.numpy(), exchange.gates.numpy()
        self._sums = exchange.sums.numpy()
        rows, top_k, slices = self._parts.shape
        self._slices = slices
        self._top_k = top_k * slices
        # One row's in a line.
        self._line, self._line_gates = self._parts[0].reshape(-1), self._gates[0].reshape(-1)
        # The same routes, but that -1 is a part that is computed elsewhere.
        self._here = np.zeros((rows, self._top_k), np.int64)
        self._slots_of = SlotsOf(machine.slots, exchange, machine.activation)
        self.balance = machine.balance()
        self._layer: HeterogeneousResidents | None = None
        hidden = exchange.hidden
        self._input = Matrix(hidden.data_ptr(), KERNEL_DTYPES[hidden.dtype])
        self._call = Routed()
        self._streamed = 0
        self._under_way: tuple[Placement, int | None] | None = None

    def prepare(self, layer: HeterogeneousResidents) -> None:
        """Share out one row's slices before it is known which: the CPU computes the last ones."""
        self._layer = layer
        self._streamed = round(self.balance.share * self._top_k)
        self._machine.slots.ready(self._streamed)
        if layer.cold:
            self._call = Routed.from_buffer_copy(layer.cold_table.call)
            self._call.input, self._call.output = self._input, self._sums.ctypes.data
            self._call.rows, self._call.top_k = 1, self._top_k - self._streamed
            self._call.index = self._line.ctypes.data + 8 * self._streamed
            self._call.gate = self._line_gates.ctypes.data + 4 * self._streamed

    def begin(self, layer: HeterogeneousResidents, rows: int) -> bool:
        """Have the first rows' experts computed into the exchange; False if one is not here.

        What the GPU is asked for from now on waits for all of them.
        """
        if layer is not self._layer:
            self.prepare(layer)
        parts = self._line.tolist() if rows == 1 else self._parts[:rows].ravel().tolist()
        slices, held = self._slices, layer.slices
        if not all(part // slices in held for part in parts[::slices]):
            return False
        self._sums.fill(0.0)
        alone = rows == 1 and not layer.hot
        placed = self._begin_alone(parts) if alone else self._begin_any(layer, parts, rows)
        try:
            there = [*placed.resident, *placed.streamed]
            slot = self._slots_of.add(
                [held[part // slices][part % slices] for part in there],
                lambda number: self._gates_of(there[number], parts, rows),
            )
            if placed.cpu:
                self._machine.slots.lane.wait_for_cpu()
        except BaseException:
            if placed.cpu:
                self._machine.pool.wait()
            raise
        self._under_way = placed, slot
        return True

    def finish(self) -> None:
        """Wait for the CPU, if it has begun, and note whether it was last."""
        if self._under_way is None:
            return
        (placed, slot), self._under_way = self._under_way, None
        machine, gpu_first = self._machine, False
        if placed.cpu:
            # A CPU that is done by now was not last, though the GPU may be done too: more slices
            # to ask for would only keep the host longer.
            gpu_first = machine.pool.busy
            machine.pool.wait()
            gpu_first = gpu_first and (slot is None or machine.slots.lane.done(slot))
        machine.count(placed)
        self.balance.note(placed, gpu_first=gpu_first)

    def _begin_alone(self, parts: list[int]) -> Placement:
        """Begin the CPU's part of one row, all of whose experts are cold."""
        streamed = self._streamed
        if streamed < len(parts):
            self._machine.pool.start_route(self._call)
        return Placement(parts[streamed:], [], parts[:streamed], 0.0)

    def _begin_any(self, layer: HeterogeneousResidents, parts: list[int], rows: int) -> Placement:
        """The same of any rows and experts."""
        counts = Counter(parts)
        resident = {part for part in counts if part // self._slices in layer.hot}
        placed = self.balance.place(counts, resident)
        if placed.cpu:
            cpu = set(placed.cpu)
            here = [part if part in cpu else -1 for part in parts]
            self._here[:rows] = np.reshape(here, (rows, -1))
            self._layer = None  # the call is another one from here on
            self._call.rows, self._call.top_k = rows, self._top_k
            self._call.index, self._call.gate = self._here.ctypes.data, self._gates.ctypes.data
            self._machine.pool.start_route(self._call)
        return placed

    def _gates_of(self, part: int, parts: list[int], rows: int) -> NDArray[np.float32] | float:
        """A slice's gates [most_rows], or one row's: zero where a row has not chosen its expert."""
        if rows == 1:
            return float(self._line_gates[parts.index(part)])
        gates: NDArray[np.float32] = np.zeros(self._machine.slots.gates.shape[1], np.float32)
        gates[:rows] = np.where(self._parts[:rows] == part, self._gates[:rows], 0.0).sum((1, 2))
        return gates
