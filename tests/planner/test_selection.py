from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.selection import remote_mask, select_remote
from remoe.experts import ActivationProfile

COUNTS = arrays.arrays(
    np.int64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 5)
)


def profile_of(rows: list[list[float]]) -> ActivationProfile:
    return ActivationProfile(np.array(rows, np.float32))


def test_least_used_experts_become_remote() -> None:
    partition = select_remote(profile_of([[0.4, 0.1, 0.3, 0.2], [0.1, 0.6, 0.2, 0.1]]), 0.5)
    assert partition.remote == ((1, 3), (0, 3))


def test_of_equal_experts_the_lower_index_stays_local() -> None:
    assert select_remote(profile_of([[0.25] * 4]), 0.5).remote == ((2, 3),)
    assert select_remote(profile_of([[0.2, 0.4, 0.2, 0.2]]), 0.5).remote == ((2, 3),)


def test_a_dense_layer_keeps_everything() -> None:
    partition = select_remote(profile_of([[0, 0], [0.5, 0.5]]), 1.0)
    assert partition.remote == ((), (0, 1))


@pytest.mark.parametrize(
    ("ratio", "experts", "remote"),
    [(0, 8, 0), (1, 8, 8), (0.5, 7, 3), (0.49, 8, 3), (0.3, 10, 3), (0.29, 100, 29), (0.7, 10, 7)],
)
def test_the_number_of_remote_experts_is_rounded_down(
    ratio: float, experts: int, remote: int
) -> None:
    profile = ActivationProfile(np.full((2, experts), 1 / experts, np.float32))
    assert [len(row) for row in select_remote(profile, ratio).remote] == [remote, remote]


@given(counts=COUNTS, ratio=st.floats(0, 1))
def test_no_remote_expert_is_used_more_than_a_local_one(
    counts: NDArray[np.int64], ratio: float
) -> None:
    profile = ActivationProfile.from_counts(counts)
    partition = select_remote(profile, ratio)
    mask = remote_mask(partition)
    for layer, shares in enumerate(profile.shares):
        remote, local = partition.remote[layer], partition.local(layer)
        assert sorted((*remote, *local)) == list(range(profile.experts))
        assert tuple(np.flatnonzero(mask[layer])) == remote
        for cold in remote:
            for warm in local:
                assert (shares[cold], -cold) < (shares[warm], -warm)


@given(counts=COUNTS, ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_ratio_only_adds_remote_experts(
    counts: NDArray[np.int64], ratios: tuple[float, float]
) -> None:
    profile = ActivationProfile.from_counts(counts)
    few, many = (select_remote(profile, ratio) for ratio in sorted(ratios))
    assert all(set(fewer) <= set(more) for fewer, more in zip(few.remote, many.remote, strict=True))
