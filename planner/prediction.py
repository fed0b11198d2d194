"""A prompt's activation profiles before it runs: the paper's way (A.7.4), and the simplest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planner.history import History
from planner.phases import PhaseProfiles, normalise_rows
from planner.search import SimilarPrompts
from remoe.experts import ActivationProfile
from remoe.plan import Neighbour

__all__ = [
    "ActivationPredictor",
    "MeanPredictor",
    "Prediction",
    "Prompt",
    "SimilarPromptsPredictor",
    "UniformPredictor",
    "neighbours_of",
    "phase_profiles",
    "softmax",
]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a prediction is made from: the tokens, and the embedder's vector of them."""

    token_ids: list[int]
    vector: NDArray[np.float32]  # [dimension]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the prompt will probably use, and the history entries that say so."""

    profiles: PhaseProfiles
    neighbours: tuple[Neighbour, ...] = ()


class ActivationPredictor(Protocol):
    def predict(self, prompt: Prompt) -> Prediction:
        """Predict both phases; every row of both profiles sums to 1."""
        ...


def softmax(scores: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    scaled = scores.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    result: NDArray[np.float64] = powers / powers.sum()
    return result


def phase_profiles(shares: NDArray[np.floating]) -> PhaseProfiles:
    """Name the halves of [2, layers, experts], their rows scaled to sum 1."""
    prefill, decode = (ActivationProfile(half) for half in normalise_rows(shares))
    return PhaseProfiles(prefill, decode)


def neighbours_of(
    history: History,
    rows: NDArray[np.intp],
    similarities: NDArray[np.float32],
    weights: NDArray[np.float64],
) -> tuple[Neighbour, ...]:
    """Describe the entries a prediction rests on, as a plan shows them."""
    return tuple(
        Neighbour(
            history_id=int(history.ids[row]),
            topic=history.topic(int(row)),
            similarity=round(float(similarity), 6),
            weight=round(float(weight), 6),
        )
        for row, similarity, weight in zip(rows, similarities, weights, strict=True)
    )


class UniformPredictor:
    """Every expert of a layer alike, whatever the prompt (the paper's EF)."""

    def __init__(self, *, layers: int, experts: int, moe_layers: tuple[int, ...]) -> None:
        shares = np.zeros((layers, experts), np.float32)
        shares[list(moe_layers)] = 1 / experts
        profile = ActivationProfile(shares)
        self._prediction = Prediction(PhaseProfiles(profile, profile))

    def predict(self, prompt: Prompt) -> Prediction:
        return self._prediction


class MeanPredictor:
    """The history's demand-weighted mean, whatever the prompt (the paper's DOP); uniform if empty."""

    def __init__(self, history: History) -> None:
        self._history = history

    def predict(self, prompt: Prompt) -> Prediction:
        return Prediction(self._history.mean_profiles())


class SimilarPromptsPredictor:
    """SPS: Ŝ = Σ_j softmax(similarity / temperature)_j · S̃_j over the nearest prompts.

    Both phases have the same neighbours and weights. With the tree it is the paper's SPS, with
    exact search its BF.
    """

    def __init__(
        self, history: History, search: SimilarPrompts, *, neighbours: int, temperature: float
    ) -> None:
        self._history = history
        self._search = search
        self._neighbours = neighbours
        self._temperature = temperature

    def predict(self, prompt: Prompt) -> Prediction:
        rows, similarities = self._search.nearest(prompt.vector, self._neighbours)
        if len(rows) == 0:
            return Prediction(self._history.mean_profiles())
        weights = softmax(similarities, self._temperature)
        shares = np.tensordot(weights, self._history.profiles(rows), axes=1)
        return Prediction(
            phase_profiles(shares), neighbours_of(self._history, rows, similarities, weights)
        )
