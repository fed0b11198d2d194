"""The compiled kernel (native/kernel.c), called on weights where they lie in the mapped file."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remoe.activation import SILU, Activation, ActivationName
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.kernel.interface import KernelUnavailableError, ReadExpert, RoutedRows
from remoe.kernel.native import LIBRARY

__all__ = ["NativeKernel", "native_variants"]

# As in native/kernel.h.
_ABI = 2
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}
_ACTIVATIONS: dict[ActivationName, int] = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "clamped_swiglu": 3,
}


class _Matrix(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("dtype", ctypes.c_int64))


class _Expert(ctypes.Structure):
    _fields_ = (
        ("gate", _Matrix),
        ("up", _Matrix),
        ("down", _Matrix),
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
        ("expert", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("row_index", ctypes.c_void_p),
        ("gate_weight", ctypes.c_void_p),
        ("input", _Matrix),
        ("output", ctypes.c_void_p),
    )


class _Held:
    """An expert as the library sees it; keeps its memory alive.

    Matrices that do not lie row after row in the mapped file, transposed or interleaved ones, are
    copied so once; the others stay in the file. Biases are widened.
    """

    __slots__ = ("address", "inner", "kept", "struct")

    def __init__(self, tensors: ExpertTensors) -> None:
        gate, up, down = (
            np.ascontiguousarray(t.values) for t in (tensors.gate, tensors.up, tensors.down)
        )
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


def _matrix(values: NDArray[np.generic]) -> _Matrix:
    assert values.flags.c_contiguous  # noqa: S101  # as made above, and as a call's body is
    return _Matrix(values.ctypes.data, _DTYPES[values.dtype])


class NativeKernel:
    """One handle of the library: its variant, its threads, its buffers. Safe from any thread."""

    def __init__(
        self,
        read: ReadExpert,
        *,
        threads: int = 1,
        variant: str | None = None,
        activation: Activation = SILU,
        library: Path | None = None,
    ) -> None:
        self._library = _open_library(library or LIBRARY)
        self._read = read
        self._activation = activation
        self._experts: dict[ExpertId, _Held] = {}
        self._handle = self._library.remoe_open(threads, variant and variant.encode())
        if not self._handle:
            raise KernelUnavailableError(
                f"this machine cannot run variant {variant} on {threads} threads"
            )
        variant = variant or native_variants(library or LIBRARY)[0]
        self.description = f"native {variant}, {threads} thread{'s' * (threads > 1)}"

    @property
    def loaded(self) -> int:
        return len(self._experts)

    def weighted_sum(self, experts: Sequence[ExpertId], rows: RoutedRows) -> NDArray[np.float32]:
        held = [self._hold(expert) for expert in experts]
        total = np.zeros(rows.hidden.shape, np.float32)
        if not held:
            return total
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
        if self._library.remoe_forward(self._handle, ctypes.byref(call)) != 0:
            raise MemoryError("no memory for the expert kernel's buffers")
        return total

    def close(self) -> None:
        """End its threads; the kernel must not be used again."""
        if self._handle:
            self._library.remoe_close(self._handle)
            self._handle = None

    def _hold(self, expert: ExpertId) -> _Held:
        held = self._experts.get(expert)
        if held is None:
            held = self._experts[expert] = _Held(self._read(expert))
        return held


def native_variants(library: Path = LIBRARY) -> list[str]:
    """What this machine can run, the fastest first."""
    opened, names = _open_library(library), list[str]()
    while name := opened.remoe_variant(len(names)):
        names.append(name.decode())
    return names


@cache
def _open_library(path: Path) -> ctypes.CDLL:
    again = "run `python -m remoe.kernel.native.build`, which needs a C compiler"
    try:
        library = ctypes.CDLL(str(path))
        library.remoe_kernel_abi.restype = ctypes.c_int64
        found = library.remoe_kernel_abi()
    except (OSError, AttributeError) as error:
        raise KernelUnavailableError(f"no native kernel ({error}): {again}") from error
    if found != _ABI:
        raise KernelUnavailableError(f"{path} was built from other sources: {again}")
    library.remoe_open.restype = ctypes.c_void_p
    library.remoe_open.argtypes = [ctypes.c_int64, ctypes.c_char_p]
    library.remoe_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.remoe_close.argtypes = [ctypes.c_void_p]
    library.remoe_close.restype = None
    library.remoe_variant.argtypes = [ctypes.c_int64]
    library.remoe_variant.restype = ctypes.c_char_p
    return library
