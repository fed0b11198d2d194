"""What prompt vectors say about routing, learned from the history: a projection and a regression.

The paper compares prompts by their token embeddings, most of whose directions do not matter to a
router. Here a ridge regression from vectors to activation profiles finds those that do: its
coefficients' leading singular vectors, each weighted by the root of its singular value, are a
projection onto a few dimensions. Cosines of projected vectors are the learned similarity, and a
second regression from them predicts profiles by itself. The projected token table is a static
embedding distilled from the model's routing: a prompt's vector is the sum of its tokens' rows.

Ours, beyond papers.md A.7.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["RoutingFit"]

# Chosen on the default model's history by 4-fold cross-validation over prompts and whole sets; the
# mean divergence moves by less than 2 % over a factor of 2 in any of them.
_DIMENSIONS = 32
_PROJECTION_RIDGE = 0.3
_REGRESSION_RIDGE = 2.0
# Wider matrices are folded at random to this many columns, which keeps inner products on average.
_SKETCH_COLUMNS = 1024


@dataclass(frozen=True, slots=True)
class RoutingFit:
    """A fitted model; d is the embedder's dimension, r the number of learned ones."""

    projection: NDArray[np.float32]  # [d, r]
    coefficients: NDArray[np.float32]  # [r + 2, profile]
    centre: NDArray[np.float32]  # [r + 2]
    mean: NDArray[np.float32]  # [profile]: the mean profile
    entries: int

    @classmethod
    def of(
        cls,
        vectors: NDArray[np.float32],
        n_tokens: NDArray[np.int32],
        profiles: NDArray[np.float32],
    ) -> Self:
        """Fit vectors [n, d] of unit length and token counts [n] to flat profiles [n, profile]."""
        inputs, fold = _sketch(vectors, seed=1)
        outputs, _ = _sketch(profiles, seed=2)
        first, _, _ = _ridge(inputs, outputs, _PROJECTION_RIDGE)  # [d', profile']
        values, axes = np.linalg.eigh(first @ first.T)  # ascending; squared singular values
        leading = slice(None, -1 - min(_DIMENSIONS, len(values)), -1)
        weights = np.maximum(values[leading], 0) ** 0.25
        folded = (axes[:, leading] * weights).astype(np.float32)  # [d', r]
        projection = folded if fold is None else folded[fold.buckets] * fold.signs[:, None]
        features = _features(_project(vectors, projection), n_tokens)
        coefficients, centre, mean = _ridge(features, profiles, _REGRESSION_RIDGE)
        return cls(projection, coefficients, centre, mean, len(vectors))

    def project(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return [n, r] of unit length, whose dot products are the learned similarity."""
        return _project(vectors, self.projection)

    def regress(
        self, projected: NDArray[np.float32], n_tokens: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Return profiles [n, profile] from projected vectors; rows need not sum to 1."""
        features = _features(projected, n_tokens) - self.centre
        return (features @ self.coefficients + self.mean).astype(np.float32, copy=False)


def _project(vectors: NDArray[np.float32], projection: NDArray[np.float32]) -> NDArray[np.float32]:
    projected = vectors @ projection
    lengths = np.linalg.norm(projected, axis=1, keepdims=True)
    return (projected / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)


def _features(projected: NDArray[np.float32], n_tokens: NDArray[np.integer]) -> NDArray[np.float32]:
    """Append functions of the length, scaled to vary as the vectors do: the chat template's own
    tokens are the larger part of a short prompt."""
    lengths = n_tokens.astype(np.float32)[:, None]
    return np.hstack([projected, 5 / lengths, 0.1 * np.log(lengths)]).astype(np.float32)


def _ridge(
    inputs: NDArray[np.float32], outputs: NDArray[np.float32], strength: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return coefficients, mean input and mean output; strength is in mean squared features."""
    centre, mean = inputs.mean(axis=0), outputs.mean(axis=0)
    centred = inputs - centre
    gram: NDArray[np.float64] = (centred.T @ centred).astype(np.float64)
    spread = float(np.trace(gram)) / len(gram)
    ridge = strength * (spread or 1.0) * np.eye(len(gram))
    coefficients = np.linalg.solve(gram + ridge, centred.T @ (outputs - mean))
    return coefficients.astype(np.float32), centre, mean


@dataclass(frozen=True, slots=True)
class _Fold:
    """Where each column went, and under which sign: [columns] each."""

    buckets: NDArray[np.int64]
    signs: NDArray[np.float32]


def _sketch(values: NDArray[np.float32], *, seed: int) -> tuple[NDArray[np.float32], _Fold | None]:
    """Fold columns of a wide matrix together under random signs (a count sketch)."""
    columns = values.shape[1]
    if columns <= _SKETCH_COLUMNS:
        return values, None
    chance = np.random.default_rng(seed)
    buckets: NDArray[np.int64] = chance.integers(_SKETCH_COLUMNS, size=(columns,))
    signs = chance.choice(np.array([-1, 1], np.float32), size=columns)
    order = np.argsort(buckets, kind="stable")
    starts = np.searchsorted(buckets[order], np.arange(_SKETCH_COLUMNS))
    folded = np.empty((len(values), _SKETCH_COLUMNS), np.float32)
    for row, line in enumerate(values):  # a row at a time: a signed copy of all would be large
        folded[row] = np.add.reduceat((line * signs)[order], np.minimum(starts, columns - 1))
    folded[:, np.bincount(buckets, minlength=_SKETCH_COLUMNS) == 0] = 0
    return folded, _Fold(buckets, signs)
