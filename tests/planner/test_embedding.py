from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.embedding import TokenTableEmbedder
from remoe.checkpoint import Checkpoint
from tests.planner.worlds import HIDDEN, VOCAB, World


class ArrayTable:
    """An embedding table that is an array."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self._rows = rows

    @property
    def hidden_size(self) -> int:
        return int(self._rows.shape[1])

    def embedding_rows(self, token_ids: list[int]) -> NDArray[np.float32]:
        return self._rows[token_ids]


def soft_cosine(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Equation (11) as printed: ownership vectors and the Gram matrix of all tokens."""
    stacked = np.concatenate([first, second]).astype(np.float64)
    stacked /= np.linalg.norm(stacked, axis=1, keepdims=True)
    gram = stacked @ stacked.T
    mine = np.arange(len(stacked)) < len(first)
    v1, v2 = mine.astype(float), (~mine).astype(float)
    norms = np.sqrt(max(v1 @ gram @ v1, 0)) * np.sqrt(max(v2 @ gram @ v2, 0))
    return float(v1 @ gram @ v2 / (norms + 1e-9))


def test_golden_similarity_of_two_prompts() -> None:
    embedder = TokenTableEmbedder(ArrayTable(np.array([[1, 0], [0, 1], [2, 0]], np.float32)))
    assert embedder.embed([0, 1]) @ embedder.embed([2]) == pytest.approx(0.70711, abs=5e-6)


PROMPT = st.lists(st.integers(0, 11), min_size=1, max_size=20)


@given(
    table=arrays.arrays(np.float32, (12, 5), elements=st.floats(0.125, 4, width=32), unique=True),
    first=PROMPT,
    second=PROMPT,
)
def test_cosine_of_sums_is_the_soft_cosine(
    table: NDArray[np.float32], first: list[int], second: list[int]
) -> None:
    embedder = TokenTableEmbedder(ArrayTable(table))
    cosine = float(embedder.embed(first) @ embedder.embed(second))
    assert cosine == pytest.approx(soft_cosine(table[first], table[second]), abs=2e-6)


@given(prompt=PROMPT, data=st.data())
def test_vector_is_of_unit_length_and_ignores_token_order(
    prompt: list[int], data: st.DataObject
) -> None:
    rows = np.random.default_rng(3).standard_normal((12, 16)).astype(np.float32)
    embedder = TokenTableEmbedder(ArrayTable(rows))
    vector = embedder.embed(prompt)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    shuffled = data.draw(st.permutations(prompt))
    np.testing.assert_allclose(embedder.embed(shuffled), vector, atol=1e-6)


def test_tokens_without_direction_add_nothing() -> None:
    embedder = TokenTableEmbedder(ArrayTable(np.array([[0, 0], [3, 4]], np.float32)))
    np.testing.assert_allclose(embedder.embed([0, 1, 0]), [0.6, 0.8], atol=1e-6)
    np.testing.assert_array_equal(embedder.embed([0]), [0, 0])


def test_reads_the_table_of_a_checkpoint(world: World) -> None:
    checkpoint = Checkpoint.open(world.folder / "model")
    embedder = TokenTableEmbedder(checkpoint)
    assert embedder.dimension == HIDDEN
    last = checkpoint.embedding_rows([VOCAB - 1])[0]
    np.testing.assert_allclose(embedder.embed([VOCAB - 1]), last / np.linalg.norm(last), atol=1e-6)
