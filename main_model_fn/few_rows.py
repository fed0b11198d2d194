"""A layer's local experts for the few rows of a decoding step, in as few steps as the host can.

What the CPU computes begins as soon as the router's choice is known; then copies and the GPU's part
are asked for while it runs. The arguments of both lie where they always do.

Behind a layer's copies go some slices of the expert that the next layer is foretold to choose: the
link would have nothing to do until it has chosen. If it chooses another, they were for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from main_model_fn.exchange import Exchange
from main_model_fn.native_dtypes import KERNEL_DTYPES
from main_model_fn.placement import Placement
from main_model_fn.slots import SlotsOf
from main_model_fn.streaming import ExpertWeights
from remoe.kernel.structures import Matrix, Routed

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
        self._sums, self._foretold = exchange.sums.numpy(), exchange.foretold.numpy()
        rows, top_k, slices = self._parts.shape
        self._slices = slices
        self._top_k = top_k * slices
        # One row's in a line; and twice, so that those from anywhere on are in a line.
        self._line, self._line_gates = self._parts[0].reshape(-1), self._gates[0].reshape(-1)
        self._line_at = self._line.ctypes.data, self._line_gates.ctypes.data
        self._twice = np.zeros((2, self._top_k), np.int64)
        self._twice_gates = np.zeros((2, self._top_k), np.float32)
        self._twice_at = self._twice.ctypes.data, self._twice_gates.ctypes.data
        # The same routes, but that -1 is a part that is computed elsewhere.
        self._here = np.zeros((rows, self._top_k), np.int64)
        self._slots_of = SlotsOf(machine.slots, exchange, machine.activation)
        self.balance = machine.balance()
        self._layer: HeterogeneousResidents | None = None
        hidden = exchange.hidden
        self._input = Matrix(hidden.data_ptr(), KERNEL_DTYPES[hidden.dtype])
        self._call = Routed()
        self._under_way: tuple[Placement, int | None] | None = None
        # Sent before it was asked for: of which layer, the first slices of which expert, and where.
        self._foretells = machine.slices_ahead if rows == 1 else 0
        self._ahead: tuple[HeterogeneousResidents, int, list[int]] | None = None
        self._next_expert = -1

    def prepare(self, layer: HeterogeneousResidents) -> None:
        """Make ready what a layer takes, before its routes are known."""
        self._layer = layer
        self._machine.slots.ready(round(self.balance.share * self._top_k))
        if layer.cold:
            self._call = Routed.from_buffer_copy(layer.cold_table.call)
            self._call.input, self._call.output = self._input, self._sums.ctypes.data

    def begin(
        self,
        layer: HeterogeneousResidents,
        rows: int,
        following: HeterogeneousResidents | None = None,
    ) -> bool:
        """Have the first rows' experts computed into the exchange; False if one is not here.

        What the GPU is asked for from now on waits for all of them. `following` is the next layer.
        """
        ahead, self._ahead = self._ahead, None
        if layer is not self._layer:
            self.prepare(layer)
        parts = self._line.tolist() if rows == 1 else self._parts[:rows].ravel().tolist()
        slices, held = self._slices, layer.slices
        if not all(part // slices in held for part in parts[::slices]):
            return False
        self._sums.fill(0.0)
        here, slots, unwanted = range(0), list[int](), 0
        if ahead is not None:
            foretold, first, slots = ahead
            if foretold is layer and first in parts:
                here = range(first, first + len(slots))
            else:
                slots, unwanted = [], len(slots)
        alone = rows == 1 and not layer.hot
        begin = self._begin_alone if alone else self._begin_any
        placed = begin(layer, parts, rows, here)
        try:
            others = [p for p in (*placed.resident, *placed.streamed) if p not in here]
            there = [*here, *others]
            slot, later = self._slots_of.add(
                [held[part // slices][part % slices] for part in others],
                lambda number: self._gates_of(there[number], parts, rows),
                ahead=slots,
                unwanted=unwanted,
                following=lambda: self._foretell(following),
            )
            if following is not None and later:
                self._ahead = following, self._next_expert * slices, later
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

    def _foretell(self, following: HeterogeneousResidents | None) -> list[ExpertWeights]:
        """Slices to be sent now of the expert that the next layer is likeliest to choose.

        By now the GPU has said which; where it has not, none are, or the wrong ones.
        """
        self._next_expert, self._foretold[0] = int(self._foretold[0]), -1
        if following is None or self._next_expert not in following.cold:
            return []
        return following.slices[self._next_expert][: self._foretells]

    def _begin_alone(self, _layer: object, parts: list[int], _rows: int, here: range) -> Placement:
        """Begin the CPU's part of one row, all of whose experts are cold: the last in a line.

        Those that are `here` on the GPU are the first in it.
        """
        count = len(parts)
        start = parts.index(here.start) if here else 0
        streamed = len(here) + round(self.balance.share * (count - len(here)))
        if streamed < count:
            (index, gate), skipped = self._line_at, start + streamed
            if start:
                self._twice[:], self._twice_gates[:] = self._line, self._line_gates
                index, gate = self._twice_at
            self._call.rows, self._call.top_k = 1, count - streamed
            self._call.index, self._call.gate = index + 8 * skipped, gate + 4 * skipped
            self._machine.pool.start_route(self._call)
        parts = parts[start:] + parts[:start]
        return Placement(parts[streamed:], [], parts[:streamed], 0.0)

    def _begin_any(
        self,
        layer: HeterogeneousResidents,
        parts: list[int],
        rows: int,
        here: Collection[int],
    ) -> Placement:
        """The same of any rows and experts."""
        counts = Counter(parts)
        resident = {part for part in counts if part // self._slices in layer.hot}
        placed = self.balance.place(counts, resident.union(here))
        if here:
            kept = [part for part in placed.resident if part not in here]
            placed = Placement(placed.cpu, kept, [*here, *placed.streamed], 0.0)
        if placed.cpu:
            cpu = set(placed.cpu)
            self._here[:rows] = np.reshape([p if p in cpu else -1 for p in parts], (rows, -1))
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
