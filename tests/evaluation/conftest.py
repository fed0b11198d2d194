"""A tiny model with a made-up history in which similar prompts use similar experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from evaluation.workbench import Options, Workbench
from models.smollm2_8x135m.corpus import LEFT_OUT_SETS
from planner.phases import normalise_rows
from remoe.checkpoint import Checkpoint
from tests.gateway.tiny_text import write_model
from tests.tiny_model import build_tiny_checkpoint

PROMPTS = 240


@pytest.fixture
def history_bench(tmp_path: Path) -> Workbench:
    """A tiny model's folder with a history of three topics, one of them of a set left out."""
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    write_model(model_dir)  # its tokenizer, so that the whole platform can run
    vocabulary = Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_vocab_size()
    build_tiny_checkpoint(model_dir, vocabulary=vocabulary)
    checkpoint = Checkpoint.open(model_dir)
    chance = np.random.default_rng(0)
    topic = chance.choice(3, PROMPTS, p=(0.47, 0.47, 0.06))
    centres = chance.normal(size=(3, checkpoint.hidden_size))
    vectors = centres[topic] + 0.3 * chance.normal(size=(PROMPTS, checkpoint.hidden_size))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    shape = (checkpoint.layers, checkpoint.experts)
    usual = chance.dirichlet(np.full(shape[1], 0.5), (2, 3, shape[0]))  # [phase, topic, layer, ...]
    noise = chance.dirichlet(np.full(shape[1], 0.5), (2, PROMPTS, shape[0]))
    shares = normalise_rows(0.8 * usual[:, topic] + 0.2 * noise)
    np.savez(
        model_dir / "history.npz",
        vectors=vectors.astype(np.float16),
        profiles=shares[0].astype(np.float16),
        decode_profiles=shares[1].astype(np.float16),
        n_tokens=chance.integers(5, 50, PROMPTS).astype(np.int32),
        topic=topic.astype(np.int32),
        topics=np.array(["one/a", "two/b", f"{LEFT_OUT_SETS[0]}/c"]),
        model_digest=np.array(checkpoint.digest),
    )
    return Workbench(Options(out=tmp_path / "out", model_dir=model_dir, quick=True), "some")
