"""Random experts and rows in every layout a kernel may meet, and what it should answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from remoe.activation import SILU, Activation, ActivationName
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.kernel.interface import RoutedRows
from remoe.mapped import MappedTensor, to_float32

_T = TypeVar("_T", bound=np.generic)
StoredDtype = Literal["BF16", "F16", "F32"]
DTYPES: tuple[StoredDtype, ...] = ("BF16", "F16", "F32")

_ACTIVATIONS: dict[ActivationName, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def activated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up, in torch."""
    if activation.name != "clamped_swiglu":
        return _ACTIVATIONS[activation.name](gate) * up
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))


def interleaved(tensors: ExpertTensors) -> ExpertTensors:
    """The same expert as strided views, with gate and up by turns and everything transposed."""
    gate, up, down = tensors.gate, tensors.up, tensors.down
    both = np.stack([gate.values, up.values], axis=1).reshape(-1, gate.values.shape[1]).T.copy()
    return ExpertTensors(
        MappedTensor(both.T[0::2], gate.dtype),
        MappedTensor(both.T[1::2], up.dtype),
        MappedTensor(down.values.T.copy().T, down.dtype),
        tensors.gate_bias,
        tensors.up_bias,
        tensors.down_bias,
    )


def stored(values: NDArray[np.float32], dtype: StoredDtype, *, shift: int = 0) -> MappedTensor:
    """As in a checkpoint: narrowed, and `shift` bytes off any alignment, with nothing after it."""
    if dtype == "BF16":
        narrow: NDArray[np.generic] = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        narrow = values.astype(np.float16 if dtype == "F16" else np.float32)
    buffer = bytearray(shift + narrow.nbytes)
    buffer[shift:] = narrow.tobytes()
    placed = np.frombuffer(buffer, narrow.dtype, offset=shift).reshape(values.shape)
    return MappedTensor(placed, dtype)


@dataclass(frozen=True)
class Case:
    experts: dict[ExpertId, ExpertTensors]
    rows: RoutedRows

    @property
    def ids(self) -> list[ExpertId]:
        return list(self.experts)

    def expected(self, activation: Activation = SILU) -> NDArray[np.float64]:
        """The same in torch and float64."""
        x = torch.from_numpy(to_float32(self.rows.hidden)).double()  # [rows, hidden]
        total = torch.zeros_like(x)
        for position, tensors in enumerate(self.experts.values()):
            gate, up, down = (
                torch.from_numpy(tensor.to_float32()).double()
                for tensor in (tensors.gate, tensors.up, tensors.down)
            )
            routes = slice(self.rows.offsets[position], self.rows.offsets[position + 1])
            index = torch.from_numpy(self.rows.row_index[routes].astype(np.int64))
            gate_bias, up_bias, down_bias = (
                0 if bias is None else torch.from_numpy(bias.to_float32()).double()
                for bias in (tensors.gate_bias, tensors.up_bias, tensors.down_bias)
            )
            inner = activated(x[index] @ gate.T + gate_bias, x[index] @ up.T + up_bias, activation)
            weight = torch.from_numpy(self.rows.gate[routes].astype(np.float64))
            total[index] += weight[:, None] * (inner @ down.T + down_bias)
        result: NDArray[np.float64] = total.numpy()
        return result

    def of_row(self, row: int) -> Case:
        """That row's routes alone."""
        kept: list[tuple[ExpertId, int]] = []
        for position, expert in enumerate(self.experts):
            start, end = self.rows.offsets[position : position + 2]
            kept += [(expert, at) for at in range(start, end) if self.rows.row_index[at] == row]
        rows = RoutedRows(
            hidden=self.rows.hidden[row : row + 1],
            offsets=list(range(len(kept) + 1)),
            row_index=np.zeros(len(kept), np.int32),
            gate=self.rows.gate[[at for _, at in kept]],
        )
        return Case({expert: self.experts[expert] for expert, _ in kept}, rows)


def random_case(
    rng: np.random.Generator,
    *,
    hidden: int,
    inner: int,
    rows: int,
    experts: int = 2,
    weights: StoredDtype = "BF16",
    input_dtype: StoredDtype = "F32",
    shift: int = 0,
    biased: bool = False,
    strided: bool = False,
) -> Case:
    def tensor(*shape: int) -> MappedTensor:
        values = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))
        return stored(values, weights, shift=shift)

    made = {
        ExpertId(0, index): ExpertTensors(
            gate=tensor(inner, hidden),
            up=tensor(inner, hidden),
            down=tensor(hidden, inner),
            gate_bias=tensor(inner) if biased else None,
            up_bias=tensor(inner) if biased else None,
            down_bias=tensor(hidden) if biased else None,
        )
        for index in range(experts)
    }
    if strided:
        made = {expert: interleaved(tensors) for expert, tensors in made.items()}
    x = 2 * rng.standard_normal((rows, hidden)).astype(np.float32)
    routed = [np.flatnonzero(rng.random(rows) < 0.7) for _ in range(experts)]
    index = np.concatenate(routed)
    gate = rng.random(index.size, np.float32)
    return Case(
        made,
        RoutedRows(
            hidden=stored(x, input_dtype, shift=shift).values,
            offsets=[0, *np.cumsum([part.size for part in routed]).tolist()],
            row_index=_shifted(index.astype(np.int32), shift),
            gate=_shifted(gate, shift),
        ),
    )


def _shifted(values: NDArray[_T], shift: int) -> NDArray[_T]:
    buffer = bytearray(shift + values.nbytes)
    buffer[shift:] = values.tobytes()
    return np.frombuffer(buffer, values.dtype, offset=shift)
