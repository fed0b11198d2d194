"""Reads and writes the trained delta: routers in bf16, low-rank factors in int8 with one scale a rank vector."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from models.smollm2_8x135m.recipe import Architecture, bf16_bits, delta_name, delta_shapes, quantize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from models.smollm2_8x135m.recipe import FloatArray

# Axis of a factor along which one rank vector lies: rows of A, columns of B.
_VECTOR_AXIS = {"experts.Agu": 2, "experts.Bgu": 1, "experts.Adn": 2, "experts.Bdn": 1}


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


class Delta:
    """A delta spread over several safetensors files, read a tensor at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._where: dict[str, tuple[Path, str, list[int], int, int]] = {}
        for path in paths:
            header, start = _read_header(path)
            for name, entry in header.items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    self._where[name] = (
                        path,
                        entry["dtype"],
                        entry["shape"],
                        start + first,
                        last - first,
                    )

    def tensor(self, layer: int, part: str) -> FloatArray:
        """Return one tensor in float32; `part` is a key of `recipe.delta_shapes`."""
        name = delta_name(layer, part)
        values = self._read(name)
        return values * self._read(f"{name}.scale") if f"{name}.scale" in self._where else values

    def rank(self) -> int:
        """Return the rank of the factors."""
        return self._where[delta_name(0, "experts.Agu")][2][1]

    def _read(self, name: str) -> FloatArray:
        path, dtype, shape, offset, size = self._where[name]
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if dtype == "BF16":
            bits = np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32).reshape(shape)
        numpy_dtype = {"F32": np.float32, "F16": np.float16, "I8": np.int8}[dtype]
        return np.frombuffer(data, dtype=numpy_dtype).astype(np.float32).reshape(shape)


def write_delta(
    paths: Sequence[Path], arch: Architecture, rank: int, tensors: Mapping[str, FloatArray]
) -> None:
    """Write a delta split evenly by layer over `paths`; `tensors` are float32 by full name."""
    bounds = np.linspace(0, arch.layers, len(paths) + 1).astype(int)
    for path, first, last in zip(paths, bounds[:-1], bounds[1:], strict=True):
        entries: list[tuple[str, str, tuple[int, ...], bytes]] = []
        for layer in range(first, last):
            for part, shape in delta_shapes(arch, rank).items():
                name = delta_name(layer, part)
                values = np.asarray(tensors[name], dtype=np.float32)
                if values.shape != shape:
                    raise ValueError(f"{name}: {values.shape}, expected {shape}")
                if part in _VECTOR_AXIS:
                    codes, scale = quantize(values, _VECTOR_AXIS[part])
                    entries.append((name, "I8", codes.shape, codes.tobytes()))
                    entries.append((f"{name}.scale", "F32", scale.shape, scale.tobytes()))
                else:
                    entries.append((name, "BF16", shape, bf16_bits(values).tobytes()))
        _write(path, entries)


def _write(path: Path, entries: list[tuple[str, str, tuple[int, ...], bytes]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Widest dtype first keeps every tensor aligned, which safetensors readers expect.
    entries.sort(key=lambda entry: ({"F32": 0, "BF16": 1, "I8": 2}[entry[1]], entry[0]))
    for name, dtype, shape, data in entries:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, data in entries:
            file.write(data)


def _read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size
