"""The compiled kernel (native/kernel.c), called on weights where they lie in the mapped file."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from remoe.activation import SILU, Activation, ActivationName
from remoe.expert_call import ITEM_BYTES, ExpertCall, RowDtype
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.kernel.interface import ReadExpert, RoutedRows
from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import DTYPES, Matrix, Routed

__all__ = ["ExpertTable", "NativeKernel"]

# As in native/kernel.h.
_ACTIVATIONS: dict[ActivationName, int] = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "clamped_swiglu": 3,
}


_DTYPES: dict[RowDtype, int] = {"float32": 0, "bfloat16": 1, "float16": 2}


class _Expert(ctypes.Structure):
    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("gate_bias", ctypes.c_void_p),
        ("up_bias", ctypes.c_void_p),
        ("down_bias", ctypes.c_void_p),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("experts", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("spared", ctypes.c_int64),
        ("expert", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("row_index", ctypes.c_void_p),
        ("gate_weight", ctypes.c_void_p),
        ("input", Matrix),
        ("output", ctypes.c_void_p),
    )
    kept: object = None
    """What the addresses lie in."""


class _Bytes(ctypes.Structure):
    _fields_ = (("values", ctypes.c_char_p), ("dtype", ctypes.c_int64))


class _BytesCall(ctypes.Structure):
    """A `_Call` whose arrays are Python's bytes, which it keeps alive."""

    _fields_ = tuple(
        (
            name,
            {"row_index": ctypes.c_char_p, "gate_weight": ctypes.c_char_p, "input": _Bytes}.get(
                name, kind
            ),
        )
        for name, kind in _Call._fields_
    )


class _Held:
    """An expert as the library sees it; keeps its memory alive.

    Matrices that do not lie row after row in the mapped file, transposed or interleaved ones, are
    copied so once; the others stay in the file. Biases are widened.
    """

    __slots__ = ("_in_place", "address", "inner", "kept", "struct")

    def __init__(self, tensors: ExpertTensors) -> None:
        matrices = (tensors.gate, tensors.up, tensors.down)
        gate, up, down = (np.ascontiguousarray(t.values) for t in matrices)
        inner, hidden = gate.shape
        if up.shape != (inner, hidden) or down.shape != (hidden, inner):
            raise ValueError(f"expert shapes {gate.shape}, {up.shape}, {down.shape} do not fit")
        biases = [
            None if bias is None else bias.to_float32()
            for bias in (tensors.gate_bias, tensors.up_bias, tensors.down_bias)
        ]
        self.kept = (tensors, gate, up, down, biases)
        self.inner = inner
        self.struct = _Expert(
            *(_matrix(weights) for weights in (gate, up, down)),
            *(None if bias is None else bias.ctypes.data for bias in biases),
        )
        self.address = ctypes.addressof(self.struct)
        self._in_place = []
        for tensor in matrices:
            if tensor.values.flags.c_contiguous:
                self._in_place.append(tensor)
            else:
                tensor.release()  # the copy serves from now on

    def prefault(self) -> None:
        for tensor in self._in_place:
            tensor.prefault()


def _matrix(values: NDArray[np.generic]) -> Matrix:
    assert values.flags.c_contiguous  # noqa: S101  # as made above, and as a call's body is
    return Matrix(values.ctypes.data, DTYPES[values.dtype])


class ExpertTable:
    """Some experts of one layer, as a router's choices are computed on them. Never changes."""

    def __init__(
        self,
        pool: NativePool,
        held: dict[int, _Held],
        *,
        experts: int,
        hidden: int,
        activation: Activation,
    ) -> None:
        self.experts = frozenset(held)
        self._pool = pool
        self._held = held
        self._table = (ctypes.c_void_p * experts)(
            *(held[i].address if i in held else None for i in range(experts))
        )
        self.call = Routed(  # without rows; it points into this table
            hidden=hidden,
            inner=next((one.inner for one in held.values()), 0),
            activation=_ACTIVATIONS[activation.name],
            alpha=activation.alpha,
            limit=activation.limit,
            experts=experts,
            table=ctypes.addressof(self._table),
        )

    def add(
        self,
        total: int,
        rows: Matrix,
        index: int,
        gate: int,
        shape: tuple[int, int],
        *,
        beside: bool = False,
    ) -> None:
        """Add the outputs of these experts where `index` chose them; others are passed over.

        Addresses of float32 `total` [tokens, hidden], int64 `index` and float32 `gate`, both of
        `shape` [tokens, top_k]; `rows` is [tokens, hidden]. Some processors are left to what is
        computed `beside`. Not from two threads at once.
        """
        routed = self.call
        routed.rows, routed.top_k = shape
        routed.index, routed.gate, routed.input, routed.output = index, gate, rows, total
        routed.spared = self._pool.spared if beside else 0
        self._pool.route(routed)


class NativeKernel:
    """Experts on a pool of native threads. Safe from any thread."""

    def __init__(
        self, read: ReadExpert, pool: NativePool, *, activation: Activation = SILU
    ) -> None:
        self._read = read
        self._pool = pool
        self._activation = activation
        self._experts: dict[tuple[int, int], _Held] = {}
        self.description = pool.description

    @property
    def loaded(self) -> int:
        return len(self._experts)

    def weighted_sum(
        self,
        experts: Sequence[ExpertId],
        rows: RoutedRows,
        total: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        if total is None:
            total = np.zeros(rows.hidden.shape, np.float32)
        if experts:
            self._pool.forward(self._call(experts, rows, total))
        return total

    def answer(self, call: ExpertCall) -> bytes:
        # Without an array: numpy's code would have to come back into the processor's caches, which
        # the weights of the last call went through, for each call of one row.
        held = [self._hold(call.layer, index) for index in call.experts]
        partial = bytearray(len(call.hidden) // ITEM_BYTES[call.dtype] * 4)
        if not held or not partial:
            return bytes(partial)
        count = len(held)
        pointers = (ctypes.c_void_p * count)(*[expert.address for expert in held])
        offsets = (ctypes.c_int64 * (count + 1))(*call.offsets)
        output = ctypes.c_char.from_buffer(partial)
        self._pool.forward(
            _BytesCall(
                len(partial) // call.rows // 4,
                held[0].inner,
                _ACTIVATIONS[self._activation.name],
                self._activation.alpha,
                self._activation.limit,
                count,
                call.rows,
                self._pool.spared if call.beside else 0,
                ctypes.addressof(pointers),
                ctypes.addressof(offsets),
                call.row_index,
                call.gate,
                _Bytes(call.hidden, _DTYPES[call.dtype]),
                ctypes.addressof(output),
            )
        )
        return bytes(partial)

    def start(
        self, experts: Sequence[ExpertId], rows: RoutedRows, total: NDArray[np.float32]
    ) -> Callable[[], None]:
        """Begin adding to `total` on a thread beside; what is returned waits for the end.

        At least one expert; one such call at a time, and it must be waited for.
        """
        call = self._call(experts, rows, total)
        wait = self._pool.start(call)

        def finish(_alive: object = (call, rows, total)) -> None:
            wait()

        return finish

    def _call(
        self, experts: Sequence[ExpertId], rows: RoutedRows, total: NDArray[np.float32]
    ) -> _Call:
        """The call, which keeps the weights it names alive; `rows` and `total` it does not."""
        held = [self._hold(expert.layer, expert.index) for expert in experts]
        pointers = (ctypes.c_void_p * len(held))(*[expert.address for expert in held])
        offsets = (ctypes.c_int64 * len(rows.offsets))(*rows.offsets)
        call = _Call(
            hidden=rows.hidden.shape[1],
            inner=held[0].inner,
            activation=_ACTIVATIONS[self._activation.name],
            alpha=self._activation.alpha,
            limit=self._activation.limit,
            experts=len(held),
            rows=len(rows.hidden),
            expert=ctypes.addressof(pointers),
            offsets=ctypes.addressof(offsets),
            row_index=rows.row_index.ctypes.data,
            gate_weight=rows.gate.ctypes.data,
            input=_matrix(rows.hidden),
            output=total.ctypes.data,
        )
        call.kept = (held, pointers, offsets)
        return call

    def load(self, expert: ExpertId) -> None:
        """Have an expert's weights in memory before it is called."""
        self._hold(expert.layer, expert.index).prefault()

    def table(
        self, layer: int, resident: Iterable[int], *, experts: int, hidden: int
    ) -> ExpertTable:
        """Resident experts of a layer of so many, for rows of `hidden` numbers."""
        held = {index: self._hold(layer, index) for index in resident}
        return ExpertTable(
            self._pool, held, experts=experts, hidden=hidden, activation=self._activation
        )

    def forget(self, expert: ExpertId) -> None:
        """Keep nothing of an expert; it is read again if it is called again."""
        self._experts.pop((expert.layer, expert.index), None)

    def close(self) -> None:
        """End the pool's threads; the kernel must not be used again."""
        self._pool.close()

    def _hold(self, layer: int, index: int) -> _Held:
        held = self._experts.get((layer, index))
        if held is None:
            held = _Held(self._read(ExpertId(layer, index)))
            self._experts[layer, index] = held
        return held
