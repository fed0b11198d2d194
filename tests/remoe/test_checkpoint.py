from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from remoe.checkpoint import Checkpoint, to_float32
from remoe.errors import CheckpointError
from remoe.experts import ExpertId
from tests.tiny_model import EXPERTS, HIDDEN, LAYERS, VOCABULARY, reference


def test_reads_shapes_sizes_and_tensors(tiny_model_dir: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    assert (checkpoint.layers, checkpoint.experts, checkpoint.top_k) == (LAYERS, EXPERTS, 2)
    assert (checkpoint.hidden_size, checkpoint.vocab_size) == (HIDDEN, VOCABULARY)
    assert checkpoint.expert_size_bytes == 3 * 48 * HIDDEN * 4
    total = sum(parameter.numel() * 4 for parameter in reference(tiny_model_dir).parameters())
    experts = LAYERS * EXPERTS * checkpoint.expert_size_bytes
    assert checkpoint.non_expert_size_bytes + experts == total
    assert checkpoint.kv_bytes_per_token == 2 * LAYERS * 2 * 8 * 2
    module = reference(tiny_model_dir).model
    tensors = checkpoint.expert(ExpertId(2, 1))
    expected = module.layers[2].mlp.experts.down_proj[1].detach().numpy()
    assert np.array_equal(tensors.down.values, expected)
    rows = checkpoint.embedding_rows([5, 0, 5])
    assert np.array_equal(rows, module.embed_tokens.weight[[5, 0, 5]].detach().numpy())


@given(st.lists(st.floats(width=16, allow_nan=False), min_size=1))
def test_bfloat16_is_widened_exactly(values: list[float]) -> None:
    tensor = torch.tensor(values).to(torch.bfloat16)
    bits = tensor.view(torch.uint16).numpy()
    assert np.array_equal(to_float32(bits), tensor.float().numpy())


def test_digest_depends_on_the_weights_layout_and_not_on_the_folder(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    assert Checkpoint.open(copy).digest == Checkpoint.open(tiny_model_dir).digest
    (copy / "remoe.json").write_text('{"digest": "sha256:written-by-the-builder"}')
    assert Checkpoint.open(copy).digest == "sha256:written-by-the-builder"


@pytest.fixture
def damaged(tiny_model_dir: Path, tmp_path: Path) -> Path:
    target = tmp_path / "damaged"
    shutil.copytree(tiny_model_dir, target)
    return target


def test_a_missing_folder_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="remoe model build"):
        Checkpoint.open(tmp_path / "nothing")


def test_a_truncated_shard_is_noticed_at_once(damaged: Path) -> None:
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        Checkpoint.open(damaged)


def test_garbage_is_not_a_checkpoint(damaged: Path) -> None:
    next(damaged.glob("*.safetensors")).write_bytes(b"garbage, and not little of it" * 10)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(damaged)


def test_an_unsupported_family_is_named(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"'llama' are not supported.*mixtral"):
        Checkpoint.open(damaged)


def test_a_missing_expert_is_named(damaged: Path) -> None:
    shard = next(damaged.glob("*.safetensors"))
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, shard)
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0"):
        Checkpoint.open(damaged)
