"""The tables about prompts, on a made-up history in which similar prompts use similar experts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from evaluation import prediction, similarity
from evaluation.similarity import rank_correlation
from evaluation.workbench import Options, Workbench
from models.smollm2_8x135m.corpus import LEFT_OUT_SETS
from planner.phases import normalise_rows
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError

PROMPTS = 240


@pytest.fixture
def bench(tmp_path: Path, tiny_model_dir: Path) -> Workbench:
    """A tiny model's folder with a history of three topics, one of them of a set left out."""
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
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


def test_similarity_finds_that_similar_prompts_use_similar_experts(bench: Workbench) -> None:
    result = similarity.make(bench)
    overall = result.series[1].named()[0]
    assert float(overall["pearson_paper"] or 0) < -0.5
    assert float(overall["pearson_learned"] or 0) < -0.5
    pairs = result.series[0]
    assert len(pairs.rows) % 30 == 0
    nearest = pairs.numbers("js_nats")[[kind == "nearest" for kind in pairs.column("drawn")]]
    drawn = pairs.numbers("js_nats")[[kind == "random" for kind in pairs.column("drawn")]]
    assert nearest.mean() < drawn.mean()


def test_prediction_ranks_the_methods_and_keeps_its_items(bench: Workbench) -> None:
    result = prediction.make(bench)
    rows = {str(row["predictor"]): row for row in result.series[0].named()}
    divergence = {name: float(row["known"] or 0) for name, row in rows.items()}
    assert divergence["oracle: the prompt's own"] == 0
    assert divergence["BF: exact search"] < divergence["DOP: the history's mean"]
    assert divergence["regression and neighbours (default)"] < divergence["EF: uniform"]
    # No text is kept in a history, and Fate asks about tokens.
    assert not any(name.startswith("Fate") for name in rows)
    exact = next(row for row in result.series[2].named() if "BF" in str(row["search"]))
    assert exact["recall_of_15"] == 1
    assert prediction.make(bench).series == result.series
    assert {"accuracy", "search"} <= set(bench.reused)


def test_a_model_without_a_history_says_what_to_do(tmp_path: Path, tiny_model_dir: Path) -> None:
    bench = Workbench(Options(out=tmp_path, model_dir=tiny_model_dir), "some")
    with pytest.raises(SettingsError, match="remoe profile activations"):
        similarity.make(bench)


def test_rank_correlation_is_spearmans() -> None:
    values = np.array([1.0, 2.0, 2.0, 5.0])
    # Ranks 1, 2.5, 2.5, 4 against 4, 3, 2, 1: Pearson's of those.
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert rank_correlation(values, np.array([4.0, 3.0, 2.0, 1.0])) == pytest.approx(-0.9486833)
    assert rank_correlation(np.exp(values), values) == pytest.approx(1)
    assert rank_correlation(np.ones(4), values) == 0
