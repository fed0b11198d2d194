from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.divergence import profile_divergence
from planner.history import History
from planner.prediction import ActivationPredictor, MeanPredictor, Prompt, SimilarPromptsPredictor
from planner.regression import RegressionPredictor
from planner.routing_fit import RoutingFit
from planner.search import ExactSearch
from remoe.experts import ActivationProfile

LAYERS, EXPERTS, DIMENSION = 3, 4, 40


class Routing:
    """A world whose profiles depend on two hidden directions of a prompt's vector, and its length."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = np.random.default_rng(seed)
        self._axes = np.random.default_rng(1).standard_normal((DIMENSION, LAYERS, EXPERTS))
        self._axes[2:] = 0

    def prompt(self) -> tuple[NDArray[np.float32], int]:
        vector = self._chance.standard_normal(DIMENSION)
        return (vector / np.linalg.norm(vector)).astype(np.float32), int(
            self._chance.integers(5, 200)
        )

    def profile(self, vector: NDArray[np.float32], n_tokens: int) -> ActivationProfile:
        scores = np.exp(
            3 * np.tensordot(vector, self._axes, axes=1) + 5 / n_tokens * np.arange(EXPERTS)
        )
        scores[0] = 0  # a dense layer
        sums = scores.sum(axis=1, keepdims=True)
        return ActivationProfile((scores / np.where(sums > 0, sums, 1)).astype(np.float32))

    def history(self, count: int, capacity: int = 2000) -> History:
        history = History.in_memory(
            dimension=DIMENSION,
            layers=LAYERS,
            experts=EXPERTS,
            capacity=capacity,
            moe_layers=(1, 2),
        )
        self.grow(history, count)
        return history

    def grow(self, history: History, count: int) -> None:
        for _ in range(count):
            vector, n_tokens = self.prompt()
            profile = self.profile(vector, n_tokens)
            history.add(vector, profile, profile, n_tokens)


def predictor_over(history: History) -> RegressionPredictor:
    similar = SimilarPromptsPredictor(history, ExactSearch(history), neighbours=15, temperature=1)
    return RegressionPredictor(history, similar)


def fitted(history: History) -> RegressionPredictor:
    predictor = predictor_over(history)
    predictor.install(RoutingFit.of(*predictor.sample()))
    return predictor


def test_beats_neighbours_and_mean_where_few_directions_matter() -> None:
    world = Routing()
    history = world.history(500)
    rivals: tuple[ActivationPredictor, ...] = (
        fitted(history),
        SimilarPromptsPredictor(history, ExactSearch(history), neighbours=15, temperature=1),
        MeanPredictor(history),
    )
    divergence = np.zeros(3)
    for _ in range(50):
        vector, n_tokens = world.prompt()
        truth = world.profile(vector, n_tokens)
        for place, rival in enumerate(rivals):
            predicted = rival.predict(Prompt([1] * n_tokens, vector)).profiles
            divergence[place] += profile_divergence(predicted.decode, truth)
    assert divergence[0] < divergence[1] / 2
    assert divergence[0] < divergence[2] / 2


@settings(max_examples=25, deadline=None)
@given(entries=st.integers(1, 80), seed=st.integers(0, 50))
def test_rows_sum_to_one_where_there_are_experts_and_weights_below(entries: int, seed: int) -> None:
    world = Routing(seed)
    prediction = fitted(world.history(entries)).predict(Prompt([1, 2], world.prompt()[0]))
    for profile in (prediction.profiles.prefill, prediction.profiles.decode):
        np.testing.assert_allclose(profile.shares.sum(axis=1), [0, 1, 1], atol=1e-5)
        assert profile.shares.min() >= 0
    weights = [neighbour.weight for neighbour in prediction.neighbours]
    assert len(weights) == min(entries, 15)
    assert 0 <= sum(weights) < 1


def test_a_prompt_of_the_history_is_predicted_much_as_it_was() -> None:
    world = Routing()
    history = world.history(40)
    odd = np.zeros((LAYERS, EXPERTS), np.float32)
    odd[1:, 3] = 1
    vector, _ = world.prompt()
    entry, _ = history.add(vector, ActivationProfile(odd), ActivationProfile(odd), 50)
    prediction = fitted(history).predict(Prompt([1] * 50, vector))
    assert prediction.neighbours[0].history_id == entry
    assert prediction.neighbours[0].similarity == pytest.approx(1, abs=1e-5)
    assert (prediction.profiles.decode.shares[1:, 3] > 0.5).all()


def test_what_was_observed_since_the_fit_counts_at_once_and_calls_for_another() -> None:
    world = Routing()
    history = world.history(100)
    predictor = fitted(history)
    assert not predictor.fit_is_due()
    vector, _ = world.prompt()
    odd = np.zeros((LAYERS, EXPERTS), np.float32)
    odd[1:, 3] = 1
    entry, _ = history.add(vector, ActivationProfile(odd), ActivationProfile(odd), 50)
    assert predictor.predict(Prompt([1] * 50, vector)).neighbours[0].history_id == entry
    world.grow(history, 9)
    assert not predictor.fit_is_due()
    world.grow(history, 3)
    assert predictor.fit_is_due()
    predictor.install(RoutingFit.of(*predictor.sample()))
    assert not predictor.fit_is_due()


def test_entries_that_took_another_s_place_are_projected_anew() -> None:
    world = Routing()
    history = world.history(60, capacity=60)
    predictor = fitted(history)
    vector, n_tokens = world.prompt()
    predictor.predict(Prompt([1] * n_tokens, vector))
    world.grow(history, 30)
    for row in range(60):
        here = Prompt([1] * int(history.n_tokens[row]), history.vectors[row])
        assert predictor.predict(here).neighbours[0].similarity == pytest.approx(1, abs=1e-5)


def test_before_there_is_enough_to_fit_neighbours_speak() -> None:
    world = Routing()
    history = world.history(31)
    predictor = predictor_over(history)
    assert not predictor.fit_is_due()
    vector, _ = world.prompt()
    rival = SimilarPromptsPredictor(history, ExactSearch(history), neighbours=15, temperature=1)
    assert (
        predictor.predict(Prompt([1], vector)).neighbours
        == rival.predict(Prompt([1], vector)).neighbours
    )
    world.grow(history, 1)
    assert predictor.fit_is_due()


def test_wide_vectors_and_profiles_are_folded_and_still_fitted() -> None:
    chance = np.random.default_rng(0)
    vectors = chance.standard_normal((300, 1200)).astype(np.float32)
    vectors[:, :4] *= 20
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    axes = np.zeros((1200, 1100), np.float32)
    axes[:4] = chance.standard_normal((4, 1100))
    profiles = vectors @ axes
    lengths = np.full(300, 20, np.int32)
    fit = RoutingFit.of(vectors[:250], lengths[:250], profiles[:250])
    assert fit.projection.shape == (1200, 32)
    error = fit.regress(fit.project(vectors[250:]), lengths[250:]) - profiles[250:]
    assert np.square(error).mean() < 0.1 * profiles[250:].var()
