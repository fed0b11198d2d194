from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.history import History
from planner.prediction import MeanPredictor, Prompt, SimilarPromptsPredictor, softmax
from planner.search import ExactSearch
from remoe.experts import ActivationProfile


def history_of(
    vectors: list[list[float]], shares: list[list[float]], n_tokens: list[int] | None = None
) -> History:
    """One layer; vectors are scaled to unit length, and decode uses experts in reverse."""
    history = History.in_memory(
        dimension=len(vectors[0]), layers=1, experts=len(shares[0]), capacity=len(vectors)
    )
    for row, (vector, share) in enumerate(zip(vectors, shares, strict=True)):
        unit = np.array(vector, np.float32) / np.linalg.norm(vector)
        profile = ActivationProfile(np.array([share], np.float32))
        decode = ActivationProfile(np.array([share[::-1]], np.float32))
        tokens = n_tokens[row] if n_tokens else row + 1
        history.add(unit.astype(np.float32), profile, decode, tokens)
    return history


def asked(vector: NDArray[np.float32]) -> Prompt:
    return Prompt([1, 2, 3], vector)


def predictor_of(
    history: History, *, neighbours: int = 15, temperature: float = 1.0
) -> SimilarPromptsPredictor:
    return SimilarPromptsPredictor(
        history, ExactSearch(history), neighbours=neighbours, temperature=temperature
    )


def test_prediction_is_the_softmax_weighted_mean_of_the_neighbours() -> None:
    history = history_of([[1, 0], [0, 1]], [[1, 0], [0, 1]])
    prediction = predictor_of(history).predict(asked(np.array([1, 0], np.float32)))
    heavy = np.e / (np.e + 1)  # similarities 1 and 0 at temperature 1
    shares = [[heavy, 1 - heavy]]
    np.testing.assert_allclose(prediction.profiles.prefill.shares, shares, atol=1e-6)
    np.testing.assert_allclose(prediction.profiles.decode.shares[:, ::-1], shares, atol=1e-6)
    assert [n.history_id for n in prediction.neighbours] == [0, 1]
    assert [n.similarity for n in prediction.neighbours] == [1, 0]
    assert prediction.neighbours[0].weight == pytest.approx(heavy, abs=1e-6)


def test_only_the_nearest_count() -> None:
    history = history_of([[1, 0], [1, 1], [-1, 0]], [[1, 0], [1, 0], [0, 1]])
    prediction = predictor_of(history, neighbours=2).predict(asked(np.array([1, 0], np.float32)))
    np.testing.assert_allclose(prediction.profiles.prefill.shares, [[1, 0]], atol=1e-6)


def test_a_low_temperature_trusts_the_nearest() -> None:
    history = history_of([[1, 0], [1, 0.2]], [[1, 0], [0, 1]])
    sharp = predictor_of(history, temperature=0.001).predict(asked(np.array([1, 0], np.float32)))
    assert sharp.profiles.prefill.shares[0, 0] > 0.999


def test_without_a_history_rows_are_uniform() -> None:
    history = History.in_memory(dimension=2, layers=3, experts=4, capacity=1)
    prediction = predictor_of(history).predict(asked(np.array([1, 0], np.float32)))
    for profile in (prediction.profiles.prefill, prediction.profiles.decode):
        np.testing.assert_array_equal(profile.shares, np.full((3, 4), 0.25))
    assert prediction.neighbours == ()


def test_the_global_predictor_weighs_prompts_by_their_tokens() -> None:
    history = history_of([[1, 0], [0, 1]], [[1, 0], [0, 1]], n_tokens=[30, 10])
    prediction = MeanPredictor(history).predict(asked(np.array([0, 1], np.float32)))
    np.testing.assert_allclose(prediction.profiles.prefill.shares, [[0.75, 0.25]], atol=1e-6)
    np.testing.assert_allclose(prediction.profiles.decode.shares, [[0.5, 0.5]], atol=1e-6)


@given(
    counts=arrays.arrays(np.int64, (6, 3, 5), elements=st.integers(0, 9)),
    decoded=arrays.arrays(np.int64, (6, 3, 5), elements=st.integers(0, 9)),
    query=arrays.arrays(np.float32, 4, elements=st.floats(-1, 1, width=32)),
    temperature=st.floats(0.01, 100),
)
def test_every_predicted_row_sums_to_one_where_a_neighbour_used_the_layer(
    counts: NDArray[np.int64],
    decoded: NDArray[np.int64],
    query: NDArray[np.float32],
    temperature: float,
) -> None:
    history = History.in_memory(dimension=4, layers=3, experts=5, capacity=6)
    vectors = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    for row, vector in enumerate(vectors):
        prefill = ActivationProfile.from_counts(counts[row])
        decode = ActivationProfile.from_counts(decoded[row])
        history.add(vector / np.linalg.norm(vector), prefill, decode, row + 1)
    query = query / max(float(np.linalg.norm(query)), 1.0)
    profiles = predictor_of(history, temperature=temperature).predict(asked(query)).profiles
    for profile, seen in ((profiles.prefill, counts), (profiles.decode, decoded)):
        used = seen.sum(axis=(0, 2)) > 0
        np.testing.assert_allclose(profile.shares.sum(axis=1), used.astype(float), atol=1e-5)


@given(
    scores=arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1, 1, width=32)),
    temperature=st.floats(1e-3, 100),
)
def test_softmax_weights_sum_to_one_and_keep_the_order(
    scores: NDArray[np.float32], temperature: float
) -> None:
    weights = softmax(scores, temperature)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights[np.argsort(scores)]) >= 0).all()
