from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.clustering import Clustering, assign, k_medoids, pam


def blobs(centres: int, each: int, seed: int = 0) -> NDArray[np.float32]:
    chance = np.random.default_rng(seed)
    middles = 10 * np.eye(centres, 12)
    points = middles.repeat(each, axis=0) + 0.1 * chance.standard_normal((centres * each, 12))
    return points.astype(np.float32)


def summed_distance(points: NDArray[np.float32], medoids: NDArray[np.intp]) -> float:
    apart = points[:, None] - points[None, medoids]
    return float((apart.astype(float) ** 2).sum(axis=2).min(axis=1).sum())


@pytest.mark.parametrize("clustering", [k_medoids, pam])
def test_finds_clusters_that_are_there(clustering: Clustering) -> None:
    points = blobs(4, 30)
    medoids = clustering(points, 4, np.random.default_rng(1))
    assert sorted(medoids // 30) == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.diff(assign(points, points[medoids]).reshape(4, 30)), 0)


@given(seed=st.integers(0, 200), forks=st.integers(2, 3))
def test_pam_cannot_be_improved_by_one_swap(seed: int, forks: int) -> None:
    points = np.random.default_rng(seed).standard_normal((14, 3)).astype(np.float32)
    medoids = pam(points, forks, np.random.default_rng(0))
    assert len(set(medoids.tolist())) == forks
    found = summed_distance(points, medoids)
    for place, other in itertools.product(range(forks), range(len(points))):
        swapped = medoids.copy()
        swapped[place] = other
        assert summed_distance(points, swapped) >= found * (1 - 1e-4)


@given(seed=st.integers(0, 200))
def test_each_medoid_is_the_best_of_its_own_cluster(seed: int) -> None:
    points = np.random.default_rng(seed).standard_normal((40, 3)).astype(np.float32)
    medoids = k_medoids(points, 3, np.random.default_rng(seed))
    # Ten rounds settle forty points.
    nearest = assign(points, points[medoids])
    for cluster, medoid in enumerate(medoids):
        members = np.flatnonzero(nearest == cluster)
        costs = [
            summed_distance(points[members], np.array([place])) for place in range(len(members))
        ]
        own = summed_distance(points[members], np.flatnonzero(members == medoid))
        assert own <= min(costs) * (1 + 1e-4)


@pytest.mark.parametrize("clustering", [k_medoids, pam])
def test_copies_of_one_prompt_make_one_cluster(clustering: Clustering) -> None:
    points = np.ones((50, 4), np.float32)
    assert len(clustering(points, 5, np.random.default_rng(0))) == 1
