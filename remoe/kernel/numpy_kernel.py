"""A gated expert in numpy and float32: serves where nothing was compiled, and checks what was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from remoe.activation import SILU, Activation, ActivationName
from remoe.expert_call import ExpertCall
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.kernel.calls import routed_rows
from remoe.kernel.interface import ReadExpert, RoutedRows
from remoe.mapped import MappedTensor, to_float32

__all__ = ["ExpertMatrices", "NumpyKernel", "expert_forward", "silu"]


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """Float32 weights: `gate_up` [2 x intermediate, hidden], `down` [hidden, intermediate]."""

    gate_up: NDArray[np.float32]
    down: NDArray[np.float32]
    gate_up_bias: NDArray[np.float32] | None = None
    down_bias: NDArray[np.float32] | None = None

    @classmethod
    def widen(cls, tensors: ExpertTensors) -> Self:
        """Widen an expert's stored weights; exact, and twice their size for 16-bit types."""
        gate_up = _stack(tensors.gate, tensors.up)
        down = tensors.down.to_float32()
        if tensors.gate_bias is None or tensors.up_bias is None or tensors.down_bias is None:
            return cls(gate_up, down)
        biases = _stack(tensors.gate_bias, tensors.up_bias)
        return cls(gate_up, down, biases, tensors.down_bias.to_float32())


def _stack(first: MappedTensor, second: MappedTensor) -> NDArray[np.float32]:
    """Both widened, one below the other; they are of one shape."""
    rows, *rest = first.values.shape
    both = np.empty((2 * rows, *rest), np.float32)
    first.to_float32(both[:rows])
    second.to_float32(both[rows:])
    return both


class NumpyKernel:
    """Widens an expert's weights at its first row, and keeps them."""

    description = "numpy"

    def __init__(self, read: ReadExpert, *, activation: Activation = SILU) -> None:
        self._read = read
        self._activation = activation
        self._weights: dict[ExpertId, ExpertMatrices] = {}

    @property
    def loaded(self) -> int:
        return len(self._weights)

    def weighted_sum(
        self,
        experts: Sequence[ExpertId],
        rows: RoutedRows,
        total: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        hidden = to_float32(rows.hidden)  # [rows, hidden]
        if total is None:
            total = np.zeros_like(hidden)
        for position, expert in enumerate(experts):
            routes = slice(rows.offsets[position], rows.offsets[position + 1])
            index = rows.row_index[routes]  # each row at most once for one expert
            if index.size:
                output = expert_forward(hidden[index], self._matrices(expert), self._activation)
                total[index] += rows.gate[routes, None] * output
        return total

    def answer(self, call: ExpertCall) -> bytes:
        experts = [ExpertId(call.layer, index) for index in call.experts]
        return self.weighted_sum(experts, routed_rows(call)).astype("<f4", copy=False).tobytes()

    def forget(self, expert: ExpertId) -> None:
        self._weights.pop(expert, None)

    def _matrices(self, expert: ExpertId) -> ExpertMatrices:
        weights = self._weights.get(expert)
        if weights is None:
            weights = ExpertMatrices.widen(self._read(expert))
            self._weights[expert] = weights
        return weights


def silu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x * sigmoid(x), written with tanh so that no exponential overflows."""
    return x * _sigmoid(x)


def _sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    half = np.float32(0.5)
    result: NDArray[np.float32] = half + half * np.tanh(half * x)
    return result


def _gelu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    erfc = np.fromiter((math.erfc(v) for v in (x * -math.sqrt(0.5)).flat), np.float32, x.size)
    result: NDArray[np.float32] = x * np.float32(0.5) * erfc.reshape(x.shape)
    return result


def _gelu_tanh(x: NDArray[np.float32]) -> NDArray[np.float32]:
    cubic = x + np.float32(0.044715) * x * x * x
    return x * _sigmoid(np.float32(math.sqrt(8 / math.pi)) * cubic)


_SIMPLE: dict[ActivationName, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "silu": silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


def _activate(
    gate: NDArray[np.float32], up: NDArray[np.float32], activation: Activation
) -> NDArray[np.float32]:
    if activation.name == "clamped_swiglu":
        limit, alpha = np.float32(activation.limit), np.float32(activation.alpha)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate * _sigmoid(alpha * gate) * (up + np.float32(1))
    return _SIMPLE[activation.name](gate) * up


def expert_forward(
    x: NDArray[np.float32], weights: ExpertMatrices, activation: Activation = SILU
) -> NDArray[np.float32]:
    """down(act(gate(x)) * up(x)) for rows `x` [rows, hidden]; the result has the same shape."""
    gate_up = _project(x, weights.gate_up, weights.gate_up_bias)
    gate, up = np.split(gate_up, 2, axis=1)  # [rows, intermediate] each
    return _project(_activate(gate, up, activation), weights.down, weights.down_bias)


def _project(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    # A matrix-vector product reads each weight once, which a product of matrices does not.
    projected = (weight @ x[0])[None] if len(x) == 1 else x @ weight.T
    return projected if bias is None else projected + bias
