"""The default predictor: a regression, corrected by what the nearest prompts really did.

Ŝ = f(x) + Σ_j w_j (S̃_j - f(x_j)) with f and the similarity of `routing_fit`, and
w_j = k_j / (Σ k + s), k_j = exp((similarity_j - 1) / t): far from every prompt of the history the
regression speaks alone, and close to one its profile decides. The paper's SPS is f = 0, s = 0.

Ours, beyond papers.md A.7.4.
"""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from planner.history import History
from planner.prediction import (
    ActivationPredictor,
    Prediction,
    Prompt,
    neighbours_of,
    phase_profiles,
)
from planner.routing_fit import RoutingFit

__all__ = ["RegressionPredictor"]

_TEMPERATURE = 0.05  # t
_SHRINKAGE = 0.1  # s
# With fewer entries there is nothing to fit; a fit is renewed when the history has changed by a
# tenth, and rests on so many entries at most: a second of one core, at the default model's size.
_FEWEST_ENTRIES = 32
_MOST_ENTRIES = 4096
_RENEW_SHARE = 10
_LEAST_SHARE = 1e-4  # a profile is never surer than this that an expert is not used


class RegressionPredictor:
    """Predicts from the latest fit, and as `fallback` does before there is one.

    Projected vectors are kept for each row and renewed where its entry is another. Fitting is apart
    from predicting, so that another thread can do it: `sample`, `RoutingFit.of`, `install`.
    """

    def __init__(
        self, history: History, fallback: ActivationPredictor, *, neighbours: int = 15
    ) -> None:
        self._history = history
        self._fallback = fallback
        self._neighbours = neighbours
        self._fit: RoutingFit | None = None
        self._ids = np.full(history.capacity, -1, np.int64)
        self._projected = np.zeros((history.capacity, 0), np.float32)
        self._chance = np.random.default_rng(0)
        self._first_new_id = 0

    def fit_is_due(self) -> bool:
        """Whether the history has changed enough since it was last sampled."""
        if len(self._history) < _FEWEST_ENTRIES:
            return False
        new = int((self._history.ids >= self._first_new_id).sum())
        return new * _RENEW_SHARE > len(self._history)

    def sample(self) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
        """Copy what a fit needs: vectors, token counts and flat profiles of entries at random."""
        history = self._history
        self._first_new_id = int(history.ids.max()) + 1
        count = min(len(history), _MOST_ENTRIES)
        rows = np.sort(self._chance.choice(len(history), count, replace=False))
        profiles = history.profiles(rows).reshape(count, -1)
        return history.vectors[rows], history.n_tokens[rows], profiles

    def install(self, fit: RoutingFit) -> None:
        """Predict from this fit from now on."""
        self._fit = fit
        self._ids[:] = -1
        self._projected = np.zeros((self._history.capacity, fit.projection.shape[1]), np.float32)

    def predict(self, prompt: Prompt) -> Prediction:
        fit = self._fit
        if fit is None:
            return self._fallback.predict(prompt)
        history = self._history
        here = fit.project(prompt.vector[None])  # [1, r]
        similarity, found = faiss.knn(
            here,
            self._current(fit),
            min(self._neighbours, len(history)),
            metric=faiss.METRIC_INNER_PRODUCT,
        )  # [1, neighbours] each
        rows, similarities = found[0].astype(np.intp), np.clip(similarity[0], -1, 1)
        kernel = np.exp((similarities.astype(np.float64) - 1) / _TEMPERATURE)
        weights = kernel / (kernel.sum() + _SHRINKAGE)  # [neighbours]
        there = self._projected[rows]  # [neighbours, r]
        profiles = history.profiles(rows)  # [neighbours, 2, layers, experts]
        expected = fit.regress(
            np.concatenate([here, there]),
            np.concatenate([[len(prompt.token_ids)], history.n_tokens[rows]]),
        )  # [1 + neighbours, profile]
        flat = expected[0] + weights @ (profiles.reshape(len(rows), -1) - expected[1:])
        used = fit.mean.reshape(profiles.shape[1:]).sum(axis=-1, keepdims=True) > 0
        shares = np.maximum(flat.reshape(profiles.shape[1:]), _LEAST_SHARE) * used
        return Prediction(
            phase_profiles(shares), neighbours_of(history, rows, similarities, weights)
        )

    def _current(self, fit: RoutingFit) -> NDArray[np.float32]:
        """Projected vectors of all entries: [entries, r]."""
        ids = self._history.ids
        stale = np.flatnonzero(self._ids[: len(ids)] != ids)
        if len(stale):
            self._projected[stale] = fit.project(self._history.vectors[stale])
            self._ids[stale] = ids[stale]
        return self._projected[: len(ids)]
