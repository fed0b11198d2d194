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
    """For the rows of one exchange. Slices are numbered as the kernel knows them."""

    def __init__(self, machine: Machine, exchange: Exchange) -> None:
        self._machine = machine
        self._index, self._gates = exchange.index.numpy(), exchange.gates.numpy()
        self._sums = exchange.sums.numpy()
        slices = self._slices = machine.slices
        rows, top_k = self._index.shape
        # The same by slice, as the kernel takes them; -1 is one that is computed elsewhere.
        self._parts = np.zeros((rows, top_k, slices), np.int64)
        self._part_gates = np.zeros((rows, top_k, slices), np.float32)
        self._each = np.arange(slices)
        self._addresses = self._parts.ctypes.data, self._part_gates.ctypes.data
        self._slots_of = SlotsOf(machine.slots, exchange, machine.activation)
        self.balance = machine.balance()
        self._layer: HeterogeneousResidents | None = None
        hidden = exchange.hidden
        self._input = Matrix(hidden.data_ptr(), KERNEL_DTYPES[hidden.dtype])
        self._call = Routed()

    def add(self, layer: HeterogeneousResidents, rows: int) -> bool:
        """Compute the first rows' experts into the exchange; False if one of them is not here."""
        chosen, held = self._index[:rows].ravel().tolist(), layer.slices
        if not all(map(held.__contains__, chosen)):
            return False
        alone = rows == 1 and not layer.hot
        placed = self._start_alone(layer) if alone else self._start(layer, chosen, rows)
        machine, slot = self._machine, None
        try:
            for part in (*placed.resident, *placed.streamed):
                expert, place = divmod(part, self._slices)
                gates = (
                    self._gates[0, chosen.index(expert)] if rows == 1 else self._of(expert, rows)
                )
                slot = machine.slots.send(held[expert][place], gates)
                self._slots_of.add(slot)
            machine.count(placed)
        finally:
            if placed.cpu:
                machine.pool.wait()
        self.balance.note(placed, gpu_first=slot is None or machine.slots.lane.done(slot))
        return True

    def _start_alone(self, layer: HeterogeneousResidents) -> Placement:
        """Share out one row's slices, all of them cold, and begin the CPU's part: the last ones."""
        np.add(self._index[0][:, None] * self._slices, self._each, out=self._parts[0])
        self._part_gates[0] = self._gates[0][:, None]
        parts: list[int] = self._parts[0].ravel().tolist()
        streamed = round(self.balance.share * len(parts))
        if streamed < len(parts):
            call, (index, gates) = self._call_of(layer), self._addresses
            call.rows, call.top_k = 1, len(parts) - streamed
            call.index, call.gate = index + 8 * streamed, gates + 4 * streamed
            self._sums.fill(0.0)
            self._machine.pool.start_route(call)
        else:
            self._sums.fill(0.0)
        return Placement(parts[streamed:], [], parts[:streamed], 0.0)

    def _start(self, layer: HeterogeneousResidents, chosen: list[int], rows: int) -> Placement:
        """The same of any rows and experts."""
        slices = self._slices
        counts = {e * slices + i: n for e, n in Counter(chosen).items() for i in range(slices)}
        resident = {part for part in counts if part // slices in layer.hot}
        placed = self.balance.place(counts, resident)
        self._sums.fill(0.0)
        if placed.cpu:
            np.add(self._index[:rows, :, None] * slices, self._each, out=self._parts[:rows])
            self._part_gates[:rows] = self._gates[:rows, :, None]
            here = np.isin(self._parts[:rows], placed.cpu)
            self._parts[:rows][~here] = -1
            call = self._call_of(layer)
            call.rows, call.top_k = rows, self._parts[0].size
            call.index, call.gate = self._addresses
            self._machine.pool.start_route(call)
        return placed

    def _call_of(self, layer: HeterogeneousResidents) -> Routed:
        if layer is not self._layer:
            self._layer = layer
            self._call = Routed.from_buffer_copy(layer.cold_table.call)
            self._call.input, self._call.output = self._input, self._sums.ctypes.data
        return self._call

    def _of(self, expert: int, rows: int) -> NDArray[np.float32]:
        """An expert's gates [most_rows]: zero where a row has not chosen it."""
        gates: NDArray[np.float32] = np.zeros(self._machine.slots.gates.shape[1], np.float32)
        gates[:rows] = np.where(self._index[:rows] == expert, self._gates[:rows], 0.0).sum(1)
        return gates
