"""Read a Hugging Face checkpoint without a tensor library: memory-mapped, tensor by tensor.

A process that maps a checkpoint pays only for the pages it touches, and processes share them.
The safetensors header is parsed here (8 bytes of length, then JSON) because the library's numpy
front end copies each tensor and has no bfloat16; see docs/adr/0003-mapped-checkpoints.md.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from remoe.errors import CheckpointError
from remoe.experts import ExpertId
from remoe.families import Family, family_of

__all__ = ["Checkpoint", "ExpertTensors", "MappedTensor", "to_float32"]

# Numpy has no bfloat16: its bits are carried as uint16.
_STORAGE: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
_MANIFEST = "remoe.json"


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
    """A view into a mapped file. `dtype` is safetensors' name; BF16 is carried as uint16."""

    values: NDArray[np.generic]
    dtype: str

    def to_float32(self, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return to_float32(self.values, out)


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The weights of one expert: `gate` and `up` [intermediate, hidden], `down` transposed."""

    gate: MappedTensor
    up: MappedTensor
    down: MappedTensor


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Shard:
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
        return MappedTensor(values, entry.dtype)


class Checkpoint:
    """A model folder: configuration, expert layout, and mapped tensors."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        try:
            config = msgspec.json.decode((model_dir / "config.json").read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointError(
                f"{model_dir} has no readable config.json ({error}); it must be a folder in "
                "Hugging Face format. `remoe model build` makes the default one."
            ) from error
        self.config: dict[str, object] = config
        self.family: Family = family_of(str(config.get("model_type")))
        paths = sorted(model_dir.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{model_dir} holds no *.safetensors files")
        self._shards = [_Shard(path) for path in paths]
        self._shard_of = {name: shard for shard in self._shards for name in shard.entries}

    @classmethod
    def open(cls, model_dir: Path) -> Checkpoint:
        """Map a model folder; raises CheckpointError that says what is missing or damaged."""
        checkpoint = cls(model_dir)
        checkpoint._check_experts()
        return checkpoint

    def _check_experts(self) -> None:
        for layer in range(self.layers):
            for index in range(self.experts):
                for name in self.family.expert_names(ExpertId(layer, index)):
                    if name not in self._shard_of:
                        raise CheckpointError(f"{self.model_dir} lacks the tensor {name}")

    def _number(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int):
            raise CheckpointError(f"{self.model_dir}/config.json: {key} must be a whole number")
        return value

    @property
    def layers(self) -> int:
        return self._number("num_hidden_layers")

    @property
    def experts(self) -> int:
        return self._number(self.family.experts_key)

    @property
    def top_k(self) -> int:
        return self._number(self.family.top_k_key)

    @property
    def hidden_size(self) -> int:
        return self._number("hidden_size")

    @property
    def vocab_size(self) -> int:
        return self._number("vocab_size")

    @property
    def context_length(self) -> int:
        return self._number("max_position_embeddings")

    @cached_property
    def digest(self) -> str:
        """Names the weights: the builder's digest where there is one, else one of the headers."""
        manifest = self.model_dir / _MANIFEST
        if manifest.exists():
            return str(msgspec.json.decode(manifest.read_bytes())["digest"])
        seen = hashlib.sha256(msgspec.json.encode(self.config, order="sorted"))
        for shard in self._shards:
            seen.update(shard.header + shard.size_bytes.to_bytes(8, "little"))
        return f"sha256:{seen.hexdigest()}"

    @property
    def names(self) -> list[str]:
        return sorted(self._shard_of)

    @property
    def non_expert_names(self) -> list[str]:
        return [name for name in self.names if not self.family.is_expert(name)]

    @cached_property
    def expert_size_bytes(self) -> int:
        """Bytes of one expert as stored, μ(e)."""
        return sum(self._size(name) for name in self.family.expert_names(ExpertId(0, 0)))

    @cached_property
    def non_expert_size_bytes(self) -> int:
        """Bytes of everything else as stored, Σ μ(f)."""
        return sum(self._size(name) for name in self.non_expert_names)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers, at 2 bytes a number."""
        heads = self._number("num_key_value_heads")
        head_dim = self.config.get("head_dim")
        if not isinstance(head_dim, int):
            head_dim = self.hidden_size // self._number("num_attention_heads")
        return 2 * self.layers * heads * head_dim * 2

    def _size(self, name: str) -> int:
        start, end = self._shard_of[name].entries[name].data_offsets
        return end - start

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._shard_of[name].path

    def tensor(self, name: str) -> MappedTensor:
        """A view of one tensor; its pages are read when touched. KeyError if there is none."""
        return self._shard_of[name].tensor(name)

    def expert(self, expert: ExpertId) -> ExpertTensors:
        gate, up, down = (self.tensor(name) for name in self.family.expert_names(expert))
        return ExpertTensors(gate, up, down)

    def embedding_rows(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Input embeddings [tokens, hidden] of the given ids; IndexError outside the vocabulary."""
        table = self.tensor("model.embed_tokens.weight").values  # [vocab, hidden]
        return to_float32(table[np.asarray(token_ids, dtype=np.int64)])
