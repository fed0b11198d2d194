"""Read a Hugging Face checkpoint without a tensor library: memory-mapped, tensor by tensor.

A process that maps a checkpoint pays only for the pages it touches, and processes share them.
See docs/adr/0003-mapped-checkpoints.md.
"""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from remoe.activation import Activation, ActivationName
from remoe.errors import CheckpointError
from remoe.expert_tensors import ExpertTensors, view_expert
from remoe.experts import ExpertId
from remoe.families import EXPERTS_KEYS, TOP_K_KEYS, Family, family_of
from remoe.mapped import MappedTensor, Shard, to_float32

__all__ = ["Checkpoint"]

_MANIFEST = "remoe.json"
_INDEX = "model.safetensors.index.json"
# What config.json calls an activation: transformers' names.
_ACTIVATIONS: dict[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Published beside the model and not part of it: prediction layers, and tables that old versions
# saved. Prediction layers are also numbered on after the last layer.
_BESIDE = re.compile(r"(^|\.)mtp[._]|\.rotary_emb\.inv_freq$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


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
        self._check_supported()
        paths = sorted(model_dir.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{model_dir} holds no *.safetensors files")
        self._check_index({path.name for path in paths})
        self._shards = [Shard(path) for path in paths]
        self._shard_of = {name: shard for shard in self._shards for name in shard.entries}

    @classmethod
    def open(cls, model_dir: Path) -> Checkpoint:
        """Map a model folder; raises CheckpointError that says what is missing or damaged."""
        checkpoint = cls(model_dir)
        checkpoint._check_experts()
        return checkpoint

    def _check_supported(self) -> None:
        quantized = self.config.get("quantization_config")
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise CheckpointError(
                f"{self.model_dir} is quantized ({method}); supported are 16 and 32-bit weights. "
                "Load it with transformers, dequantize, and save_pretrained."
            )

    def _check_index(self, present: set[str]) -> None:
        """A shard that was not downloaded would look like layers without experts."""
        index = self.model_dir / _INDEX
        if index.exists():
            try:
                named = msgspec.json.decode(index.read_bytes(), type=_Index)
            except msgspec.DecodeError as error:
                raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
            missing = sorted(set(named.weight_map.values()) - present)
            if missing:
                raise CheckpointError(f"{self.model_dir} lacks {', '.join(missing)}; see {_INDEX}")

    def _check_experts(self) -> None:
        if not self.moe_layers:
            expected = self.family.expert_names(ExpertId(0, 0))[0]
            seen = [name for name in self.names if "expert" in name] or self.names
            raise CheckpointError(
                f"{self.model_dir} holds no expert as {self.family.model_type} names them, "
                f"{expected}; it holds {', '.join(seen[:3])} and {max(len(seen) - 3, 0)} more"
            )
        stacked = self.family.layout.stacked
        for layer in self.moe_layers:
            for index in range(1 if stacked else self.experts):
                for name in self.family.expert_names(ExpertId(layer, index)):
                    if name not in self._shard_of:
                        raise CheckpointError(f"{self.model_dir} lacks the tensor {name}")
            name = self.family.expert_names(ExpertId(layer, self.experts))[0]
            if len(self.tensor(name).values) > self.experts if stacked else name in self._shard_of:
                raise CheckpointError(
                    f"{self.model_dir} holds more than the {self.experts} experts of its "
                    f"config.json: {name}"
                )
        self.activation  # noqa: B018  # raises if it is not supported
        gate = self.expert(ExpertId(self.moe_layers[0], 0)).gate.values.shape
        if len(gate) != 2 or gate[1] != self.hidden_size:
            raise CheckpointError(
                f"{self.model_dir}: an expert's gate is {gate}, not [intermediate, "
                f"{self.hidden_size}]"
            )

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts: those that name any expert tensor; others are dense."""
        found = {
            int(layer.group(1))
            for name in self._shard_of
            if self.family.is_expert(name) and (layer := _LAYER.search(name))
        }
        return tuple(sorted(layer for layer in found if layer < self.layers))

    @property
    def activation(self) -> Activation:
        """What the experts compute between their projections."""
        if self.family.clamped:
            default = Activation("clamped_swiglu")
            alpha = self.config.get("swiglu_alpha", default.alpha)
            limit = self.config.get("swiglu_limit", default.limit)
            if isinstance(alpha, int | float) and isinstance(limit, int | float):
                return Activation("clamped_swiglu", alpha, limit)
            raise CheckpointError(f"{self.model_dir}/config.json: swiglu_* must be numbers")
        name = str(self.config.get("hidden_act", "silu"))
        try:
            return Activation(_ACTIVATIONS[name])
        except KeyError:
            raise CheckpointError(
                f"{self.model_dir}/config.json: hidden_act {name!r} is not supported; supported: "
                f"{', '.join(_ACTIVATIONS)}"
            ) from None

    def _number(self, *keys: str) -> int:
        """The value of the first of `keys` that config.json has."""
        value = next((self.config[key] for key in keys if key in self.config), None)
        if not isinstance(value, int):
            names = " or ".join(keys)
            raise CheckpointError(f"{self.model_dir}/config.json: {names} must be a whole number")
        return value

    @property
    def layers(self) -> int:
        return self._number("num_hidden_layers")

    @property
    def experts(self) -> int:
        return self._number(*EXPERTS_KEYS)

    @property
    def top_k(self) -> int:
        return self._number(*TOP_K_KEYS)

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
        return [name for name in self.names if not self._is_expert_or_beside(name)]

    def _is_expert_or_beside(self, name: str) -> bool:
        layer = _LAYER.search(name)
        beyond = layer is not None and int(layer.group(1)) >= self.layers
        return beyond or self.family.is_expert(name) or _BESIDE.search(name) is not None

    @cached_property
    def expert_size_bytes(self) -> int:
        """Bytes of one expert as stored, μ(e)."""
        names = self.family.expert_names(ExpertId(self.moe_layers[0], 0))
        total = sum(self._size(name) for name in names)
        return total // self.experts if self.family.layout.stacked else total

    @property
    def expert_count(self) -> int:
        """Experts of all layers together."""
        return len(self.moe_layers) * self.experts

    @cached_property
    def non_expert_size_bytes(self) -> int:
        """Bytes of everything else as stored, Σ μ(f)."""
        return sum(self._size(name) for name in self.non_expert_names)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers, at 2 bytes a number.

        Layers whose state does not grow with the tokens (linear attention, convolutions) count
        nothing; latent attention is cached compressed, both halves as wide as the wider.
        """
        if isinstance(self.config.get("kv_lora_rank"), int):
            numbers = 2 * max(self._number("kv_lora_rank"), self._number("qk_rope_head_dim"))
        else:
            heads = self.config.get("num_key_value_heads")
            if not isinstance(heads, int):
                heads = self._number("num_attention_heads")
            head_dim = self.config.get("head_dim")
            if not isinstance(head_dim, int):
                head_dim = self.hidden_size // self._number("num_attention_heads")
            numbers = 2 * heads * head_dim
        return 2 * numbers * self._attention_layers

    @property
    def _attention_layers(self) -> int:
        kinds = self.config.get("layer_types")
        if not isinstance(kinds, list):
            return self.layers
        return sum(str(kind).endswith("attention") and kind != "linear_attention" for kind in kinds)

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
        """One expert's tensors where they lie, whatever the layout; nothing is read or copied."""
        return view_expert(self.family.layout, expert, self.tensor)

    def embedding_rows(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Input embeddings [tokens, hidden] of the given ids; IndexError outside the vocabulary."""
        table = self.tensor("model.embed_tokens.weight").values  # [vocab, hidden]
        return to_float32(table[np.asarray(token_ids, dtype=np.int64)])
