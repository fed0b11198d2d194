from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.experts import ExpertId
from remoe.mapped import to_float32
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


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


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
    configure(damaged, model_type="llama")
    with pytest.raises(CheckpointError, match=r"'llama' are not supported.*mixtral"):
        Checkpoint.open(damaged)


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


def test_a_missing_expert_is_named(damaged: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    _rewrite(damaged, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks the tensor {re.escape(name)}"):
        Checkpoint.open(damaged)


def test_experts_of_another_layout_are_named(damaged: Path) -> None:
    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 96, 32)

    _rewrite(damaged, fuse)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight; it holds .*gate_up_proj"):
        Checkpoint.open(damaged)


def test_more_experts_than_the_configuration_says_are_noticed(damaged: Path) -> None:
    configure(damaged, num_local_experts=3)
    with pytest.raises(CheckpointError, match="more than the 3 experts"):
        Checkpoint.open(damaged)


def test_a_shard_that_was_not_downloaded_is_named(damaged: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        Checkpoint.open(damaged)


def test_quantized_weights_are_refused(damaged: Path) -> None:
    configure(damaged, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=r"quantized \(mxfp4\).*dequantize"):
        Checkpoint.open(damaged)


def test_an_unknown_activation_is_refused(damaged: Path) -> None:
    configure(damaged, hidden_act="relu2")
    with pytest.raises(CheckpointError, match=r"hidden_act 'relu2' is not supported.*silu"):
        Checkpoint.open(damaged)


def test_prediction_layers_are_beside_the_model(damaged: Path) -> None:
    before = Checkpoint.open(damaged)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.block_sparse_moe.experts.0.w1.weight"] = torch.zeros(48, 32)
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(8, 8)
        tensors["mtp.layers.0.mlp.gate.weight"] = torch.zeros(8, 8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    _rewrite(damaged, add)
    after = Checkpoint.open(damaged)
    assert after.moe_layers == before.moe_layers == (0, 1, 2)
    assert after.non_expert_names == before.non_expert_names
    assert after.non_expert_size_bytes == before.non_expert_size_bytes
