from __future__ import annotations

import itertools
import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.remote_calls import remote_call_chance

SHARES = arrays.arrays(np.float64, (1, 6), elements=st.floats(0.01, 1)).map(
    lambda rows: rows / rows.sum(axis=1, keepdims=True)
)
MASK = arrays.arrays(np.bool_, (1, 6))


def by_enumeration(shares: NDArray[np.float64], remote: NDArray[np.bool_], top_k: int) -> float:
    """Every order in which a token could take its experts, one after the other."""
    chance = 0.0
    for drawn in itertools.permutations(range(len(shares)), top_k):
        if remote[list(drawn)].any():
            left, product = 1.0, 1.0
            for expert in drawn:
                product *= shares[expert] / left
                left -= shares[expert]
            chance += product
    return min(chance, top_k * float(shares[remote].sum()))


@given(shares=SHARES, remote=MASK, top_k=st.integers(1, 4))
def test_agrees_with_enumeration(
    shares: NDArray[np.float64], remote: NDArray[np.bool_], top_k: int
) -> None:
    (chance,) = remote_call_chance(shares, remote, top_k)
    assert chance == pytest.approx(by_enumeration(shares[0], remote[0], top_k), abs=2e-3)


@given(shares=SHARES, remote=MASK, more=MASK, top_k=st.integers(1, 4))
def test_more_remote_experts_mean_no_fewer_calls(
    shares: NDArray[np.float64],
    remote: NDArray[np.bool_],
    more: NDArray[np.bool_],
    top_k: int,
) -> None:
    few, many = (remote_call_chance(shares, mask, top_k)[0] for mask in (remote, remote | more))
    assert 0 <= few <= many + 2e-3
    assert many <= 1


def test_even_shares_give_the_hypergeometric_chance() -> None:
    shares = np.full((1, 8), 1 / 8)
    remote = np.arange(8)[None] < 3
    expected = 1 - math.comb(5, 2) / math.comb(8, 2)
    assert remote_call_chance(shares, remote, 2)[0] == pytest.approx(expected, abs=1e-4)


def test_all_none_and_dense() -> None:
    shares = np.array([[0.5, 0.5], [0.5, 0.5], [0, 0], [1, 0]])
    remote = np.array([[True, True], [False, False], [True, True], [False, True]])
    np.testing.assert_allclose(remote_call_chance(shares, remote, 2), [1, 0, 0, 0], atol=1e-12)
