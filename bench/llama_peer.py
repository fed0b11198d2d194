"""llama.cpp on the same weights, for `bench/decode.py`: `pip install xllamacpp gguf` makes it a row.

The model is written once as GGUF, bfloat16 as it is stored, in llama.cpp's layout of Mixtral.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARTS = ("xllamacpp", "gguf")
# What llama.cpp calls a Mixtral's tensors.
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
}
_EXPERT = {
    "gate": "ffn_gate_exps.weight",
    "up": "ffn_up_exps.weight",
    "down": "ffn_down_exps.weight",
}


def available() -> bool:
    return all(importlib.util.find_spec(part) for part in PARTS)


def _half_turned(weights: NDArray[np.uint16], heads: int) -> NDArray[np.uint16]:
    """Rows of a head by turns: llama.cpp rotates neighbours, transformers the two halves."""
    rows, width = weights.shape
    halves = weights.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, width))


def write_gguf(model_dir: Path, target: Path) -> None:
    """A Mixtral's checkpoint in bfloat16 as a GGUF file."""
    import gguf

    from remoe.checkpoint import Checkpoint
    from remoe.experts import ExpertId

    checkpoint = Checkpoint.open(model_dir)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(checkpoint.layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(checkpoint.experts)
    writer.add_expert_used_count(checkpoint.top_k)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, model_dir, config)

    def add(name: str, values: NDArray[np.generic]) -> None:
        if values.ndim == 1 or "gate_inp" in name:  # llama.cpp wants these in float32
            wide = (values.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(name, wide)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, values.view(np.uint8), raw_dtype=kind)

    def dense(name: str) -> NDArray[np.uint16]:
        return checkpoint.tensor(name).values.astype(np.uint16, copy=False)

    add("token_embd.weight", dense("model.embed_tokens.weight"))
    add("output_norm.weight", dense("model.norm.weight"))
    for layer in range(checkpoint.layers):
        for theirs, ours in _LAYER.items():
            values = dense(f"model.layers.{layer}.{theirs}")
            if "q_proj" in theirs or "k_proj" in theirs:
                values = _half_turned(values, heads if "q_proj" in theirs else groups)
            add(f"blk.{layer}.{ours}", values)
        experts = [checkpoint.expert(ExpertId(layer, index)) for index in range(checkpoint.experts)]
        for part, name in _EXPERT.items():
            add(f"blk.{layer}.{name}", np.stack([getattr(one, part).values for one in experts]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: object, model_dir: Path, config: dict[str, int]) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)  # the library is loaded late
    described = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"]: token["content"] for token in described["added_tokens"]}
    names = {place: token for token, place in described["model"]["vocab"].items()} | special
    kinds = [
        gguf.TokenType.CONTROL if place in special else gguf.TokenType.NORMAL
        for place in range(config["vocab_size"])
    ]
    merges = described["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([names[place] for place in range(config["vocab_size"])])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


class LlamaCpp:
    """A server of llama.cpp in this process, asked in token ids."""

    def __init__(self, model: Path, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 4096, 8, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_prompt, params.warmup = False, True
        self._server = xllamacpp.Server(params)

    def stream(self, prompt: list[int], tokens: int) -> list[tuple[float, str]]:
        """When each greedy token came, and its text."""
        asked = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        told: list[tuple[float, str]] = []

        def hear(event: dict[str, Any]) -> bool:
            choice = event["choices"][0]
            if choice["finish_reason"] is None:
                told.append((time.perf_counter(), choice["text"]))
            return False  # go on

        self._server.handle_completions(asked, hear)
        return told


def run_llama_cpp(
    model_dir: Path, prompts: list[list[int]], long: list[list[int]], tokens: int
) -> dict[str, float]:
    """One stream's tokens/s over `prompts`, and seconds to the first token of the `long` ones."""
    with tempfile.TemporaryDirectory() as folder:
        gguf_file = Path(folder) / "model.gguf"
        write_gguf(model_dir, gguf_file)
        engine = LlamaCpp(gguf_file, len(os.sched_getaffinity(0)))
        engine.stream(prompts[0], tokens)
        steps: list[float] = []
        for prompt in prompts:
            steps += np.diff([at for at, _ in engine.stream(prompt, tokens)]).tolist()
        first = []
        for prompt in long:
            began = time.perf_counter()
            first.append(engine.stream(prompt, 2)[0][0] - began)
    return {"one": 1 / statistics.median(steps), "first_s": statistics.median(first)}
