from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from planner.search import ExactSearch


@dataclass
class Store:
    vectors: NDArray[np.float32]

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.arange(len(self.vectors))


def unit_vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


@pytest.mark.parametrize("entries", [1, 14, 15, 16, 500])
def test_finds_what_brute_force_and_the_flat_index_find(entries: int) -> None:
    store = Store(unit_vectors(entries))
    index = faiss.IndexFlatIP(24)
    index.add(store.vectors)
    for query in unit_vectors(5, seed=1):
        rows, similarities = ExactSearch(store).nearest(query, 15)
        scores = store.vectors @ query
        expected = np.argsort(-scores)[:15]
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(similarities, scores[expected], atol=1e-6)
        np.testing.assert_array_equal(index.search(query[None], len(rows))[1][0], rows)


def test_an_empty_store_has_no_neighbours() -> None:
    rows, similarities = ExactSearch(Store(unit_vectors(0))).nearest(unit_vectors(1)[0], 15)
    assert len(rows) == len(similarities) == 0


def test_equal_similarities_come_in_the_store_s_order() -> None:
    store = Store(np.repeat(unit_vectors(1), 9, axis=0))
    rows, similarities = ExactSearch(store).nearest(store.vectors[0], 9)
    assert rows.tolist() == list(range(9))
    assert similarities.max() <= 1
