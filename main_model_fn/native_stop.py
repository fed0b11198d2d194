"""A step through native layers where it stopped: what is to be computed, and the sum it goes to."""

from __future__ import annotations

import numpy as np
import torch

from main_model_fn.routes import Batch, CallRows
from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import ANSWER, NOT_POSTED, Decoding, Elsewhere

__all__ = ["StepBuffers", "Stop"]


class StepBuffers:
    """What the kernel writes of a step for others, for up to `rows` new tokens.

    Routes `index` of all layers and `gate` of the last, what experts are given, the sum over them,
    the rows of experts that are elsewhere, gathered, and what became of calls that it made itself.
    """

    def __init__(
        self, rows: int, width: int, dtype: torch.dtype, *, layers: int, experts: int, top_k: int
    ) -> None:
        self.rows, self.top_k = rows, top_k
        self.normed = torch.empty((rows, width), dtype=dtype)
        self.total = torch.empty((rows, width), dtype=torch.float32)
        self.index = torch.empty(layers * rows * top_k, dtype=torch.int64)
        self.gate = torch.empty((rows, top_k), dtype=torch.float32)
        self.answers = np.zeros(layers, ANSWER)
        self.token = np.empty(rows, np.int64)
        self.expert = np.empty(experts, np.int64)
        self.offsets = np.empty(experts + 1, np.int64)
        row_bytes = width * dtype.itemsize
        self.carried, self.row_index, self.gate_weight = (
            np.empty(size, np.uint8) for size in (rows * row_bytes, *(2 * [rows * top_k * 4]))
        )

    @property
    def elsewhere(self) -> Elsewhere:
        return Elsewhere(
            token=self.token.ctypes.data,
            hidden=self.carried.ctypes.data,
            expert=self.expert.ctypes.data,
            offsets=self.offsets.ctypes.data,
            row_index=self.row_index.ctypes.data,
            gate_weight=self.gate_weight.ctypes.data,
        )


class Stop:
    """A layer at which `step` stopped: valid until it goes on, and the same object each time.

    An interrupted layer waits for what happens here, on code and data that the weights have driven
    out of the processor's caches: it is as little as can be.
    """

    def __init__(self, held: StepBuffers, step: Decoding, pool: NativePool) -> None:
        self.dtype = held.normed.dtype
        self._held = held
        self._step = step
        self._pool = pool
        self._elsewhere = step.elsewhere  # a view
        self._row_bytes = held.normed.shape[1] * self.dtype.itemsize
        self._carried, self._row_index, self._gate, self._expert, self._offsets = (
            array.data
            for array in (
                held.carried,
                held.row_index,
                held.gate_weight,
                held.expert,
                held.offsets,
            )
        )
        self._one = held.token[:1]

    @property
    def total(self) -> torch.Tensor:
        """The sum over experts, float32 [rows, hidden], to be added to."""
        return self._held.total[: self._step.rows]

    def batch(self) -> Batch:
        """What the layer's experts are given."""
        held, rows = self._held, self._step.rows
        routes = rows * held.top_k
        index = held.index[self._step.layer * routes :][:routes].view(rows, held.top_k)
        return Batch.of(held.normed[:rows], index, held.gate[:rows])

    def elsewhere(self) -> CallRows | None:
        """The rows of experts that are not here; None if all are."""
        held, found = self._held, self._elsewhere
        rows, experts, routes = found.rows, found.experts, found.routes
        if not routes:
            return None
        return CallRows(
            tokens=self._one if rows == 1 else held.token[:rows],
            hidden=bytes(self._carried[: rows * self._row_bytes]),
            experts=self._expert[:experts].tolist(),
            offsets=self._offsets[: experts + 1].tolist(),
            row_index=bytes(self._row_index[: 4 * routes]),
            gate=bytes(self._gate[: 4 * routes]),
        )

    @property
    def some_here(self) -> bool:
        """Whether any chosen expert is here."""
        elsewhere: int = self._elsewhere.routes
        rows: int = self._step.rows
        return elsewhere < rows * self._held.top_k

    @property
    def posted(self) -> np.void | None:
        """What became of a call that has left already, what is here having been computed."""
        answer = self._held.answers[self._step.layer]
        return None if answer["state"] == NOT_POSTED else answer

    def compute_here(self) -> None:
        """Add the outputs of the experts that are here."""
        if self.some_here:
            self._pool.decode_here(self._step)

    def add(self, partial: bytes) -> None:
        """Add float32 [rows of `elsewhere`, hidden] when the step goes on."""
        self._step.partial = partial
