"""A tiny dense base in a real GGUF, and a tiny delta, so that a build takes a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.smollm2_8x135m import recipe
from models.smollm2_8x135m.build import BuildInputs
from models.smollm2_8x135m.delta import write_delta
from models.smollm2_8x135m.recipe import Architecture

gguf = pytest.importorskip("gguf", reason="the model extra is not installed")

TINY = Architecture(
    layers=2,
    hidden=8,
    intermediate=12,
    heads=2,
    kv_heads=1,
    head_dim=4,
    experts=4,
    vocab=260,
    max_positions=32,
)
RANK = 2
# As tokenizers' byte-level alphabet spells them: printable bytes as themselves, others from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


def _alphabet() -> list[str]:
    others = [chr(256 + n) for n in range(256 - len(_PRINTABLE))]
    return [chr(byte) for byte in _PRINTABLE] + others


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def tiny_gguf(tmp_path: Path, random: np.random.Generator) -> Path:
    path = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_alphabet(), "ab"]
    assert len(tokens) == TINY.vocab
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))

    queries, keys = TINY.heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim
    add("token_embd", TINY.vocab, TINY.hidden)
    add("output_norm", TINY.hidden)
    for layer in range(TINY.layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm", TINY.hidden)
        add(f"{block}.ffn_norm", TINY.hidden)
        add(f"{block}.attn_q", queries, TINY.hidden)
        add(f"{block}.attn_k", keys, TINY.hidden)
        add(f"{block}.attn_v", keys, TINY.hidden)
        add(f"{block}.attn_output", TINY.hidden, queries)
        add(f"{block}.ffn_gate", TINY.intermediate, TINY.hidden)
        add(f"{block}.ffn_up", TINY.intermediate, TINY.hidden)
        add(f"{block}.ffn_down", TINY.hidden, TINY.intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_inputs(tmp_path: Path, tiny_gguf: Path, random: np.random.Generator) -> BuildInputs:
    paths = (tmp_path / "delta-1.safetensors", tmp_path / "delta-2.safetensors")
    tensors = {
        recipe.delta_name(layer, part): random.standard_normal(shape).astype(np.float32)
        for layer in range(TINY.layers)
        for part, shape in recipe.delta_shapes(TINY, RANK).items()
    }
    write_delta(paths, TINY, RANK, tensors)
    return BuildInputs("tiny", TINY, tiny_gguf, recipe.file_sha256(tiny_gguf), paths)
