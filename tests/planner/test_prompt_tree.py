from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.clustering import pam
from planner.prompt_tree import ALPHA, BETA, PromptTree, TreeSearch
from planner.search import ExactSearch


def prompts(count: int, *, topics: int = 12, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors around some directions."""
    chance = np.random.default_rng(seed)
    middles = chance.standard_normal((topics, 24))
    vectors = middles[chance.integers(topics, size=count)]
    vectors = vectors + 0.5 * chance.standard_normal((count, 24))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


@dataclass
class Store:
    vectors: NDArray[np.float32]
    ids: NDArray[np.int64]


def test_the_paper_s_sizes() -> None:
    assert (ALPHA, BETA) == (15, 150)


@settings(max_examples=30)
@given(count=st.integers(0, 400), beta=st.integers(2, 60), copies=st.booleans())
def test_leaves_share_out_all_prompts_and_are_small(count: int, beta: int, copies: bool) -> None:
    vectors = np.repeat(prompts(1), count, axis=0) if copies else prompts(count)
    leaves = PromptTree(vectors, beta=beta).leaves()
    assert sorted(np.concatenate(leaves).tolist()) == list(range(count))
    assert max(len(leaf) for leaf in leaves) <= beta


def test_a_prompt_of_the_tree_is_led_to_its_own_leaf_at_nearly_all_times() -> None:
    vectors = prompts(2000)
    tree = PromptTree(vectors)
    found = sum(row in tree.candidates(vectors[row], 1, leaves=1) for row in range(0, 2000, 10))
    assert found >= 190


def test_siblings_lend_prompts_to_a_leaf_with_too_few() -> None:
    vectors = prompts(300)
    tree = PromptTree(vectors, beta=20)
    leaves = [set(leaf.tolist()) for leaf in tree.leaves()]
    for query in prompts(20, seed=5):
        few, many = (tree.candidates(query, count, leaves=1) for count in (1, 45))
        assert set(few.tolist()) in leaves
        assert 45 <= len(many) == len(set(many.tolist())) < 300
        assert many[: len(few)].tolist() == few.tolist()
    assert len(tree.candidates(vectors[0], 10_000)) == 300


def test_more_leaves_find_more_of_the_nearest() -> None:
    vectors = prompts(4000)
    tree, exact = PromptTree(vectors), ExactSearch(Store(vectors, np.arange(4000)))
    found = []
    for leaves in (1, 3, 100):
        hits = [
            np.isin(exact.nearest(query, ALPHA)[0], tree.candidates(query, ALPHA, leaves=leaves))
            for query in prompts(40, seed=7)
        ]
        found.append(float(np.mean(hits)))
    assert 0.3 < found[0] < found[1] < found[2] == 1


def test_few_prompts_are_searched_exactly() -> None:
    store = Store(prompts(BETA), np.arange(BETA))
    for query in prompts(5, seed=3):
        rows, similarities = TreeSearch(store).nearest(query, ALPHA)
        exact, best = ExactSearch(store).nearest(query, ALPHA)
        np.testing.assert_array_equal(rows, exact)
        np.testing.assert_allclose(similarities, best, atol=1e-6)


@pytest.mark.parametrize("changed", [1, 140, 1000])
def test_a_growing_history_is_searched_whole(changed: int) -> None:
    vectors = prompts(3000)
    store = Store(vectors[:1500], np.arange(1500))
    search = TreeSearch(store)
    search.nearest(vectors[0], ALPHA)
    # New rows at the end, and entries that took the place of others.
    store.vectors = np.concatenate(
        [vectors[2000:2005], vectors[5:1500], vectors[1500 : 1500 + changed]]
    )
    store.ids = np.concatenate([np.arange(5000, 5005), np.arange(5, 1500 + changed)])
    for row in (0, 4, 1500, 1499 + changed):
        rows, similarities = search.nearest(store.vectors[row], ALPHA)
        assert (rows[0], len(rows)) == (row, ALPHA)
        assert similarities[0] == pytest.approx(1, abs=1e-6)


def test_an_empty_history_has_no_neighbours() -> None:
    rows, similarities = TreeSearch(Store(prompts(0), np.arange(0))).nearest(prompts(1)[0], ALPHA)
    assert len(rows) == len(similarities) == 0


def test_nodes_may_be_split_by_pam_and_by_other_points() -> None:
    vectors, profiles = prompts(400), prompts(400, seed=9)
    for tree in (PromptTree(vectors, clustering=pam), PromptTree(vectors, points=profiles)):
        assert sorted(np.concatenate(tree.leaves()).tolist()) == list(range(400))
