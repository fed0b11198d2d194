"""Published MoE models' shapes, and models of them with random weights but for their experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from main_model_fn.experts_modules import experts_by_layer

__all__ = ["CONFIGS", "DTYPE", "build", "shapes"]

DTYPE = torch.bfloat16

# As in the models' config.json.
CONFIGS: dict[str, Callable[[], Any]] = {
    "OLMoE-1B-7B": lambda: OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=4096,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
    ),
    "Qwen1.5-MoE-A2.7B": lambda: Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
    ),
    "DeepSeek-V2-Lite": lambda: DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=4096,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    ),
}
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}


def shapes(name: str, *, tiny: bool) -> Any:
    config = CONFIGS[name]()
    if tiny:
        for key, value in TINY.items():
            if hasattr(config, key):
                setattr(config, key, value)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def build(config: Any, device: torch.device) -> PreTrainedModel:
    """The model with random weights but for its experts, which are nowhere."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    experts = {id(p) for m in experts_by_layer(model).values() for p in m.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in experts:
                continue
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            made = made.fill_(1.0) if made.dim() == 1 else made.normal_(0, 0.02)
            module.register_parameter(name, nn.Parameter(made, requires_grad=False))
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)
    return model.eval().requires_grad_(requires_grad=False)
