"""A gated expert in numpy and float32: serves where nothing was compiled, and checks what was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from expert_fn.kernel import ReadExpert, RoutedRows
from remoe.checkpoint import ExpertTensors, to_float32
from remoe.experts import ExpertId

__all__ = ["ExpertMatrices", "NumpyKernel", "expert_forward", "silu"]


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """Float32 weights: `gate_up` [2 x intermediate, hidden], `down` [hidden, intermediate]."""

    gate_up: NDArray[np.float32]
    down: NDArray[np.float32]

    @classmethod
    def widen(cls, tensors: ExpertTensors) -> Self:
        """Widen an expert's stored weights; exact, and twice their size for 16-bit types."""
        inner, hidden = tensors.gate.values.shape
        gate_up = np.empty((2 * inner, hidden), np.float32)
        tensors.gate.to_float32(gate_up[:inner])
        tensors.up.to_float32(gate_up[inner:])
        return cls(gate_up, tensors.down.to_float32())


class NumpyKernel:
    """Widens an expert's weights at its first row, and keeps them."""

    description = "numpy"

    def __init__(self, read: ReadExpert) -> None:
        self._read = read
        self._weights: dict[ExpertId, ExpertMatrices] = {}

    @property
    def loaded(self) -> int:
        return len(self._weights)

    def weighted_sum(self, experts: Sequence[ExpertId], rows: RoutedRows) -> NDArray[np.float32]:
        hidden = to_float32(rows.hidden)  # [rows, hidden]
        total = np.zeros_like(hidden)
        for position, expert in enumerate(experts):
            routes = slice(rows.offsets[position], rows.offsets[position + 1])
            index = rows.row_index[routes]  # each row at most once for one expert
            if index.size:
                output = expert_forward(hidden[index], self._matrices(expert))
                total[index] += rows.gate[routes, None] * output
        return total

    def _matrices(self, expert: ExpertId) -> ExpertMatrices:
        weights = self._weights.get(expert)
        if weights is None:
            weights = ExpertMatrices.widen(self._read(expert))
            self._weights[expert] = weights
        return weights


def silu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x * sigmoid(x), written with tanh so that no exponential overflows."""
    half = np.float32(0.5)
    result: NDArray[np.float32] = x * (half + half * np.tanh(half * x))
    return result


def expert_forward(x: NDArray[np.float32], weights: ExpertMatrices) -> NDArray[np.float32]:
    """down(silu(gate(x)) * up(x)) for rows `x` [rows, hidden]; the result has the same shape."""
    if len(x) == 1:  # a matrix-vector product reads each weight once, which a product does not
        gate, up = np.split(weights.gate_up @ x[0], 2)  # [intermediate] each
        row: NDArray[np.float32] = weights.down @ (silu(gate) * up)  # [hidden]
        return row[None]
    gate, up = np.split(x @ weights.gate_up.T, 2, axis=1)  # [rows, intermediate] each
    result: NDArray[np.float32] = (silu(gate) * up) @ weights.down.T
    return result
