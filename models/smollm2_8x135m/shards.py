"""Streams a checkpoint to safetensors shards, an expert at a time and each one page-aligned."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.smollm2_8x135m.recipe import Architecture, bf16_bits, expert_name, gate_name, low_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from models.smollm2_8x135m.delta import Delta
    from models.smollm2_8x135m.gguf_base import GgufBase
    from models.smollm2_8x135m.recipe import FloatArray

LAYERS_PER_SHARD = 6
_BF16_BYTES = 2
# The header is padded to a page, and experts come first, so that (at the real sizes) every expert
# starts on a page: a map of one expert then touches no byte of another.
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a shard: its name, shape and how to make it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], FloatArray]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _BF16_BYTES


@dataclass(frozen=True, slots=True)
class ShardWritten:
    """What writing one shard gave."""

    sha256: str
    size_bytes: int
    tensors: tuple[str, ...]


def plan_shards(
    arch: Architecture, base: GgufBase, delta: Delta, multiplier: float
) -> list[list[TensorSpec]]:
    """Return every shard's tensors in the order they are stored."""
    shards: list[list[TensorSpec]] = []
    for first in range(0, arch.layers, LAYERS_PER_SHARD):
        layers = range(first, min(first + LAYERS_PER_SHARD, arch.layers))
        wide = [spec for layer in layers for spec in _experts(arch, base, delta, layer, multiplier)]
        narrow: list[TensorSpec] = []
        for layer in layers:
            large, small = _rest_of_layer(arch, base, delta, layer)
            wide += large
            narrow += small
        shards.append(wide + narrow)
    embedding = (arch.vocab, arch.hidden)
    shards.append(
        [
            TensorSpec(
                "model.embed_tokens.weight", embedding, lambda: base.weight("model.embed_tokens")
            ),
            TensorSpec("model.norm.weight", (arch.hidden,), lambda: base.weight("model.norm")),
        ]
    )
    return shards


def write_shard(
    path: Path, specs: list[TensorSpec], wrote_bytes: Callable[[int], None]
) -> ShardWritten:
    """Write one safetensors file, flushed to disk; `wrote_bytes` hears of each tensor's size."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.size_bytes
        header[spec.name] = {
            "dtype": "BF16",
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _PAGE_BYTES)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (len(text).to_bytes(8, "little"), text, *_tensor_bytes(specs)):
            digest.update(data)
            file.write(data)
            wrote_bytes(len(data))
        file.flush()
        os.fsync(file.fileno())
        size_bytes = file.tell()
    return ShardWritten(digest.hexdigest(), size_bytes, tuple(spec.name for spec in specs))


def _tensor_bytes(specs: list[TensorSpec]) -> Iterator[memoryview | bytes]:
    for spec in specs:
        values = spec.make()
        if values.shape != spec.shape:
            raise ValueError(f"{spec.name}: {values.shape}, expected {spec.shape}")
        yield bf16_bits(values).tobytes()


def _experts(
    arch: Architecture, base: GgufBase, delta: Delta, layer: int, multiplier: float
) -> Iterator[TensorSpec]:
    wide, tall = (arch.intermediate, arch.hidden), (arch.hidden, arch.intermediate)
    cached = _LayerCache(base, delta, layer, multiplier, arch.intermediate)
    for expert in range(arch.experts):
        for matrix, shape in (("w1", wide), ("w2", tall), ("w3", wide)):
            yield TensorSpec(
                expert_name(layer, expert, matrix),
                shape,
                lambda expert=expert, matrix=matrix: cached.expert(expert, matrix),  # type: ignore[misc]
            )


class _LayerCache:
    """Builds the experts of one layer from its base matrices, read once and dropped after the last expert."""

    def __init__(
        self, base: GgufBase, delta: Delta, layer: int, multiplier: float, intermediate: int
    ) -> None:
        self._base, self._delta, self._layer = base, delta, layer
        self._multiplier, self._intermediate = multiplier, intermediate
        self._loaded: dict[str, FloatArray] = {}

    def expert(self, index: int, matrix: str) -> FloatArray:
        side = "dn" if matrix == "w2" else "gu"
        a, b = self._factor(f"experts.A{side}")[index], self._factor(f"experts.B{side}")[index]
        if matrix == "w1":
            b = b[: self._intermediate]
        elif matrix == "w3":
            b = b[self._intermediate :]
        projection = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[matrix]
        weight = low_rank(self._dense(projection), a, b, self._multiplier)
        if (index, matrix) == (len(self._factor("experts.Agu")) - 1, "w3"):
            self._loaded.clear()
        return weight

    def _factor(self, part: str) -> FloatArray:
        if part not in self._loaded:
            self._loaded[part] = self._delta.tensor(self._layer, part)
        return self._loaded[part]

    def _dense(self, projection: str) -> FloatArray:
        if projection not in self._loaded:
            self._loaded[projection] = self._base.weight(
                f"model.layers.{self._layer}.mlp.{projection}"
            )
        return self._loaded[projection]


def _rest_of_layer(
    arch: Architecture, base: GgufBase, delta: Delta, layer: int
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return a layer's tensors outside its experts: those of whole pages, then the small ones."""
    prefix = f"model.layers.{layer}"
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim

    def from_base(part: str, *shape: int) -> TensorSpec:
        name = f"{prefix}.{part}"
        return TensorSpec(f"{name}.weight", shape, lambda: base.weight(name))

    large = [
        from_base("self_attn.q_proj", queries, arch.hidden),
        from_base("self_attn.k_proj", keys, arch.hidden),
        from_base("self_attn.v_proj", keys, arch.hidden),
        from_base("self_attn.o_proj", arch.hidden, queries),
    ]
    small = [
        TensorSpec(
            gate_name(layer),
            (arch.experts, arch.hidden),
            lambda: delta.tensor(layer, "gate.weight"),
        ),
        from_base("input_layernorm", arch.hidden),
        from_base("post_attention_layernorm", arch.hidden),
    ]
    return large, small
