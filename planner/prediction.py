"""A prompt's activation profiles before it runs (A.7.4), of prefill and decode."""

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
    "GlobalPredictor",
    "Prediction",
    "SimilarPromptsPredictor",
    "softmax",
]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the prompt will probably use, and the history entries that say so."""

    profiles: PhaseProfiles
    neighbours: tuple[Neighbour, ...] = ()


class ActivationPredictor(Protocol):
    def predict(self, vector: NDArray[np.float32]) -> Prediction:
        """Predict from a prompt vector; every row of both profiles sums to 1."""
        ...


def softmax(scores: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    scaled = scores.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    result: NDArray[np.float64] = powers / powers.sum()
    return result


class GlobalPredictor:
    """The history's demand-weighted mean, whatever the prompt (the paper's DOP); uniform if empty."""

    def __init__(self, history: History) -> None:
        self._history = history

    def predict(self, vector: NDArray[np.float32]) -> Prediction:
        return Prediction(self._history.mean_profiles())


class SimilarPromptsPredictor:
    """SPS: Ŝ = Σ_j softmax(similarity / temperature)_j · S̃_j over the nearest prompts.

    Both phases have the same neighbours and weights.
    """

    def __init__(
        self, history: History, search: SimilarPrompts, *, neighbours: int, temperature: float
    ) -> None:
        self._history = history
        self._search = search
        self._neighbours = neighbours
        self._temperature = temperature

    def predict(self, vector: NDArray[np.float32]) -> Prediction:
        rows, similarities = self._search.nearest(vector, self._neighbours)
        if len(rows) == 0:
            return Prediction(self._history.mean_profiles())
        weights = softmax(similarities, self._temperature)
        neighbours = tuple(
            Neighbour(
                history_id=int(self._history.ids[row]),
                topic=self._history.topic(int(row)),
                similarity=round(float(similarity), 6),
                weight=round(float(weight), 6),
            )
            for row, similarity, weight in zip(rows, similarities, weights, strict=True)
        )
        prefill, decode = (
            ActivationProfile(normalise_rows(np.tensordot(weights, profiles[rows], axes=1)))
            for profiles in (self._history.profiles, self._history.decode_profiles)
        )
        return Prediction(PhaseProfiles(prefill, decode), neighbours)
