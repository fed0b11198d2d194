"""Tensors of a safetensors file, mapped into memory and read page by page when touched.

The header is parsed here (8 bytes of length, then JSON) because the library's numpy front end
copies each tensor and has no bfloat16; see docs/adr/0003-mapped-checkpoints.md.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from remoe.errors import CheckpointError

__all__ = ["MappedTensor", "Shard", "to_float32"]

# Numpy has no bfloat16: its bits are carried as uint16.
_STORAGE: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}


def to_float32(
    values: NDArray[np.generic], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Widen to float32, into `out` if given; uint16 is read as bfloat16 bits. Exact."""
    if out is None:
        out = np.empty(values.shape, np.float32)
    if values.dtype == np.uint16:
        # bfloat16 is the upper half of a float32: one pass, no temporary.
        np.multiply(values, np.uint32(1 << 16), out=out.view(np.uint32))
    else:
        out[...] = values
    return out


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A view of numbers as stored. `dtype` is safetensors' name; BF16 is carried as uint16.

    `in_file` says that they lie in a mapped file, whose pages can be let go without losing them.
    """

    values: NDArray[np.generic]
    dtype: str
    in_file: bool = False

    def view(self, values: NDArray[np.generic]) -> MappedTensor:
        """Some of the same numbers."""
        return MappedTensor(values, self.dtype, self.in_file)

    def to_float32(self, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return to_float32(self.values, out)

    def prefault(self) -> None:
        """Have the file's pages in memory, and in this process, before they are needed."""
        if self.in_file and _advise(self.values, _MADV_POPULATE_READ) != 0:  # Linux before 5.14
            _advise(self.values, mmap.MADV_WILLNEED)

    def release(self) -> None:
        """Give the file's pages back to the system; who reads them again finds the same bytes."""
        if self.in_file:
            _advise(self.values, mmap.MADV_DONTNEED)


_MADV_POPULATE_READ = 22


def _advise(values: NDArray[np.generic], advice: int) -> int:
    """madvise(2) on the whole pages around a view of a read-only file map; its return value."""
    low, high = np.lib.array_utils.byte_bounds(values)
    start = low - low % mmap.PAGESIZE
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    result: int = madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(high - start), ctypes.c_int(advice)
    )
    return result


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Shard:
    """One safetensors file: its header at once, its bytes when touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size_bytes = path.stat().st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header_bytes = int.from_bytes(self._map[:8], "little")
            self.header = bytes(self._map[8 : 8 + header_bytes])
            fields = msgspec.json.decode(self.header, type=dict[str, msgspec.Raw])
            fields.pop("__metadata__", None)
            self.entries = {
                name: msgspec.json.decode(raw, type=_Entry) for name, raw in fields.items()
            }
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise CheckpointError(
                f"{path} is missing or not a safetensors file: {error}"
            ) from error
        self._data_start = 8 + header_bytes
        end = max((entry.data_offsets[1] for entry in self.entries.values()), default=0)
        if self.size_bytes < self._data_start + end:
            raise CheckpointError(
                f"{path} is cut short ({self.size_bytes} bytes, its header promises "
                f"{self._data_start + end}); download or build it again"
            )

    def tensor(self, name: str) -> MappedTensor:
        entry = self.entries[name]
        storage = _STORAGE.get(entry.dtype)
        if storage is None:
            raise CheckpointError(
                f"{name} has dtype {entry.dtype}; supported: {', '.join(_STORAGE)}"
            )
        values = np.frombuffer(
            self._map,
            dtype=storage,
            count=math.prod(entry.shape),
            offset=self._data_start + entry.data_offsets[0],
        ).reshape(entry.shape)
        return MappedTensor(values, entry.dtype, in_file=True)
