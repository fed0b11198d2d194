"""The most similar prompts of the history: the seam, and exact search (the paper's BF).

See papers.md A.7.3.
"""

from __future__ import annotations

from typing import Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = ["ExactSearch", "SimilarPrompts", "VectorStore", "best_of"]


class VectorStore(Protocol):
    """Where the prompt vectors are: float32 [entries, dimension], contiguous, unit length."""

    @property
    def vectors(self) -> NDArray[np.float32]: ...

    @property
    def ids(self) -> NDArray[np.int64]:
        """One for each row, another one when the row's vector is another."""
        ...


class SimilarPrompts(Protocol):
    def nearest(
        self, vector: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """Return rows of the store and their similarities, best first; fewer if it has fewer."""
        ...


class ExactSearch:
    """FAISS's flat inner product, the kernel of IndexFlatIP, over the history's own array.

    An index object would be a second copy of every vector, to be kept in step with the first.
    """

    def __init__(self, store: VectorStore) -> None:
        self._store = store

    def nearest(
        self, vector: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        vectors = self._store.vectors
        count = min(count, len(vectors))
        if count == 0:
            return np.zeros(0, np.intp), np.zeros(0, np.float32)
        similarity, rows = faiss.knn(
            vector[None], vectors, count, metric=faiss.METRIC_INNER_PRODUCT
        )  # [1, count] each
        order = np.lexsort((rows[0], -similarity[0]))  # equal similarities: older entry first
        return rows[0][order].astype(np.intp), np.clip(similarity[0][order], -1, 1)


def best_of(
    vectors: NDArray[np.float32],
    rows: NDArray[np.intp],
    vector: NDArray[np.float32],
    count: int,
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the most similar of some rows and their similarities, best first."""
    similarity = vectors[rows] @ vector  # [rows]
    order = np.lexsort((rows, -similarity))[:count]
    return rows[order], np.clip(similarity[order], -1, 1)
