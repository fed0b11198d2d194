"""A tiny random model of every supported family, saved as transformers publishes it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from remoe.families import EXPERTS_KEYS, TOP_K_KEYS

__all__ = ["DENSE_LAYERS", "VOCABULARY", "build_tiny_family"]

VOCABULARY = 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 8}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_SHARED = {"moe_intermediate_size": 16, "n_shared_experts": 1}
_DENSE_FIRST = {**_SHARED, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_MAMBA = {"mamba_d_state": 8, "mamba_expand": 2}
_GRANITE_MAMBA = {**_MAMBA, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
_LINEAR_FIRST = ["linear_attention", "full_attention"]
_LINEAR_HEADS = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# What a family's configuration needs besides.
_SPECIAL: dict[str, dict[str, Any]] = {
    "mixtral": _HEADS,
    "minimax": {
        **_HEADS,
        "layer_types": [*_LINEAR_FIRST, "full_attention"],
        "block_size": 16,
    },
    "minimax_m2": {**_HEADS, "rotary_dim": 4},
    "phimoe": {},
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**_HEADS, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
    "qwen3_next": {
        **_HEADS,
        **_LINEAR_HEADS,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 40,
        "layer_types": [*_LINEAR_FIRST, "linear_attention"],
    },
    "olmoe": {},
    "flex_olmo": {},
    "deepseek_v2": {**_LATENT, **_DENSE_FIRST, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, **_DENSE_FIRST},
    "glm4_moe": {**_HEADS, **_DENSE_FIRST},
    "glm4_moe_lite": {
        **_LATENT,
        **_DENSE_FIRST,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "dots1": {**_HEADS, **_DENSE_FIRST},
    "solar_open": {**_HEADS, **_SHARED, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {
        **_HEADS,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone_moe": {
        **_HEADS,
        "moe_intermediate_size": 16,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "afmoe": {
        **_HEADS,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "mellum": {**_HEADS, "moe_intermediate_size": 16},
    "cohere2_moe": {**_HEADS, "num_shared_experts": 1},
    "jamba": {
        **_MAMBA,
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": {
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "granitemoe": {"attention_multiplier": 0.25},
    "granitemoeshared": {"attention_multiplier": 0.25, "shared_intermediate_size": 20},
    "granitemoehybrid": {
        **_GRANITE_MAMBA,
        "attention_multiplier": 0.25,
        "shared_intermediate_size": 20,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "granitemoe_swa": {"attention_multiplier": 0.25},
    "gpt_oss": {**_HEADS, "rope_parameters": _YARN, "sliding_window": 8},
}


# Of the models below, those layers that have no experts.
DENSE_LAYERS: dict[str, set[int]] = {
    "qwen2_moe": {1},
    "qwen3_moe": {0, 2},
    "jamba": {0, 2},
    **{
        model_type: {0}
        for model_type in (
            "deepseek_v2",
            "deepseek_v3",
            "glm4_moe",
            "glm4_moe_lite",
            "dots1",
            "ernie4_5_moe",
            "exaone_moe",
            "afmoe",
            "lfm2_moe",
        )
    },
}


def build_tiny_family(
    target: Path,
    model_type: str,
    *,
    layers: int = 3,
    experts: int = 4,
    top_k: int = 2,
    seed: int = 0,
    **changes: object,
) -> Path:
    """Save a random float32 model of the family in `target`; it takes two layers or more."""
    torch.manual_seed(seed)
    named = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(named).parameters, *named.attribute_map}
    counts = {**dict.fromkeys(EXPERTS_KEYS, experts), **dict.fromkeys(TOP_K_KEYS, top_k)}
    config = named(
        **{
            **_COMMON,
            "num_hidden_layers": layers,
            **{key: value for key, value in counts.items() if key in known},
            **{
                key: (value * layers)[:layers] if key.endswith("layer_types") else value
                for key, value in _SPECIAL[model_type].items()
            },
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, tensor in model.named_parameters():
        # Large enough for routes and tokens to vary, as random initialisation does not; norms,
        # gates and states of recurrent layers keep their own, which their formulas rely on.
        if (tensor.dim() > 1 and "conv1d" not in name and "A_log" not in name) or (
            name.endswith("bias") and "dt_" not in name
        ):
            torch.nn.init.normal_(tensor, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(target)
    return target
