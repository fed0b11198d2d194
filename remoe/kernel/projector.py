"""Plain projections, such as a model's linear layers, on the native kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import Matrix, Projection, Projections

__all__ = ["Projector", "StoredWeights"]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """[columns, width] numbers in memory, row after row; `bias` is the address of float32s.

    `dtype` is the library's number of a type. Whoever holds the memory keeps it alive.
    """

    address: int
    dtype: int
    columns: int
    bias: int | None = None


class Projector:
    """Several projections of the same rows in one call, each rounded once to the rows' type."""

    def __init__(
        self, pool: NativePool, weights: Sequence[StoredWeights], *, width: int, dtype: int
    ) -> None:
        self._pool = pool
        self._each = (Projection * len(weights))(
            *(Projection(Matrix(w.address, w.dtype), w.bias, w.columns, None) for w in weights)
        )
        self._call = Projections(
            width=width,
            rows=0,
            count=len(weights),
            dtype=dtype,
            input=Matrix(None, dtype),
            projection=ctypes.addressof(self._each),
        )

    def __call__(self, rows: int, input_address: int, output_addresses: Sequence[int]) -> None:
        """Project [rows, width] at one address to [rows, columns] at each of the others.

        Not to be called from two threads at once.
        """
        call = self._call
        call.rows = rows
        call.input.values = input_address
        for projection, address in zip(self._each, output_addresses, strict=True):
            projection.output = address
        self._pool.project(call)
