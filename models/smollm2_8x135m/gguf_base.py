"""Reads the dense base out of its GGUF: float32 weights under Hugging Face's names, and the tokenizer's files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from models.smollm2_8x135m.recipe import BOS_ID, EOS_ID, UNK_ID, Architecture

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import GGUFReader

    from models.smollm2_8x135m.recipe import FloatArray

_CONTROL_TOKEN = 3  # GGUF's token type for special tokens

_LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GgufBase:
    """The dense base model inside one GGUF file."""

    def __init__(self, path: Path, arch: Architecture) -> None:
        from gguf import GGUFReader

        self._arch = arch
        self._reader: GGUFReader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def weight(self, name: str) -> FloatArray:
        """Return one tensor dequantised, by its Hugging Face name without `.weight`."""
        from gguf import dequantize

        heads = 0
        if name == "model.embed_tokens":
            source = "token_embd"
        elif name == "model.norm":
            source = "output_norm"
        else:
            _, _, layer, part = name.split(".", 3)
            source = f"blk.{layer}.{_LAYER_PARTS[part]}"
            heads = {
                "self_attn.q_proj": self._arch.heads,
                "self_attn.k_proj": self._arch.kv_heads,
            }.get(part, 0)
        tensor = self._tensors[f"{source}.weight"]
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        return _unpermute(values, heads) if heads else values

    def tokenizer_files(self) -> dict[str, str]:
        """Return the tokenizer's files by name."""
        tokens = self._strings("tokenizer.ggml.tokens")
        kinds = self._reader.fields["tokenizer.ggml.token_type"].contents()
        template = self._reader.fields["tokenizer.chat_template"].contents()
        specials = [index for index, kind in enumerate(kinds) if kind == _CONTROL_TOKEN]
        config = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": tokens[BOS_ID],
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": tokens[EOS_ID],
            "model_max_length": self._arch.max_positions,
            "pad_token": tokens[EOS_ID],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": tokens[UNK_ID],
        }
        backend = _tokenizer_json(tokens, self._strings("tokenizer.ggml.merges"), specials)
        return {
            "tokenizer.json": json.dumps(backend, ensure_ascii=False, separators=(",", ":")),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            "chat_template.jinja": template,
        }

    def _strings(self, key: str) -> list[str]:
        return [str(value) for value in self._reader.fields[key].contents()]


class BaseTokenizer:
    """The base's tokenizer straight from the GGUF, for training: no chat template, no folder."""

    def __init__(self, base: GgufBase) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(base.tokenizer_files()["tokenizer.json"])

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of several texts."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [list(encoding.ids) for encoding in encoded]


def _unpermute(weight: FloatArray, heads: int) -> FloatArray:
    """Undo llama.cpp's row order of rotary projections (pairs side by side) back to two halves a head."""
    half = weight.shape[0] // heads // 2
    pairs = weight.reshape(heads, half, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _tokenizer_json(tokens: list[str], merges: list[str], specials: list[int]) -> dict[str, object]:
    """Return SmolLM's byte-level BPE (digits apart, as GGUF's `pre = smollm` says) in tokenizers' own format."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index in specials
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
