from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.phases import PhaseProfiles
from planner.selection import select_remote
from remoe.experts import ActivationProfile

COUNTS = arrays.arrays(np.int64, (3, 6), elements=st.integers(0, 9))
READ = ActivationProfile(np.array([[0.7, 0.2, 0.1]], np.float32))
WRITTEN = ActivationProfile(np.array([[0.1, 0.1, 0.8]], np.float32))


def test_expected_routes_of_a_worked_example() -> None:
    routes = PhaseProfiles(READ, WRITTEN).expected_routes(10, 20, top_k=2)
    np.testing.assert_allclose(routes, [[18, 8, 34]], rtol=1e-6)
    assert routes.sum() == pytest.approx(2 * (10 + 20))


def test_one_phase_alone_is_its_own_profile() -> None:
    profiles = PhaseProfiles(READ, WRITTEN)
    np.testing.assert_allclose(profiles.mixed(5, 0).shares, READ.shares)
    np.testing.assert_allclose(profiles.mixed(0, 5).shares, WRITTEN.shares)


@given(read=COUNTS, written=COUNTS, tokens=st.tuples(st.integers(1, 500), st.floats(0, 500)))
def test_the_mix_keeps_the_order_of_expected_routes(
    read: NDArray[np.int64], written: NDArray[np.int64], tokens: tuple[int, float]
) -> None:
    profiles = PhaseProfiles(
        ActivationProfile.from_counts(read), ActivationProfile.from_counts(written)
    )
    routes = profiles.expected_routes(*tokens, top_k=2)
    mixed = profiles.mixed(*tokens)
    used = routes.sum(axis=1) > 0
    np.testing.assert_allclose(mixed.shares.sum(axis=1), used.astype(float), atol=1e-5)
    for layer, remote in enumerate(select_remote(mixed, 0.5).remote):
        local = [index for index in range(6) if index not in remote]
        if remote:
            # float32 shares may swap two that differ by rounding only.
            assert routes[layer, remote].max() <= routes[layer, local].min() * (1 + 1e-5) + 1e-9
