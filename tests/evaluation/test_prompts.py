"""The tables about prompts, on a made-up history in which similar prompts use similar experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation import prediction, similarity
from evaluation.similarity import rank_correlation
from evaluation.workbench import Options, Workbench
from remoe.errors import SettingsError


def test_similarity_finds_that_similar_prompts_use_similar_experts(
    history_bench: Workbench,
) -> None:
    result = similarity.make(history_bench)
    overall = result.series[1].named()[0]
    assert float(overall["pearson_paper"] or 0) < -0.5
    assert float(overall["pearson_learned"] or 0) < -0.5
    pairs = result.series[0]
    assert len(pairs.rows) % 30 == 0
    nearest = pairs.numbers("js_nats")[[kind == "nearest" for kind in pairs.column("drawn")]]
    drawn = pairs.numbers("js_nats")[[kind == "random" for kind in pairs.column("drawn")]]
    assert nearest.mean() < drawn.mean()


def test_prediction_ranks_the_methods_and_keeps_its_items(history_bench: Workbench) -> None:
    result = prediction.make(history_bench)
    rows = {str(row["predictor"]): row for row in result.series[0].named()}
    divergence = {name: float(row["known"] or 0) for name, row in rows.items()}
    assert divergence["oracle: the prompt's own"] == 0
    assert divergence["BF: exact search"] < divergence["DOP: the history's mean"]
    assert divergence["regression and neighbours (default)"] < divergence["EF: uniform"]
    # No text is kept in a history, and Fate asks about tokens.
    assert not any(name.startswith("Fate") for name in rows)
    exact = next(row for row in result.series[2].named() if "BF" in str(row["search"]))
    assert exact["recall_of_15"] == 1
    assert prediction.make(history_bench).series == result.series
    assert {"accuracy", "search"} <= set(history_bench.reused)


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
