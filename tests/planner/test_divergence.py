from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.divergence import js_divergence, profile_divergence
from remoe.experts import ActivationProfile


def test_golden_divergence_from_uniform() -> None:
    nats = js_divergence(np.array([0.5, 0.25, 0.125, 0.125]), np.full(4, 0.25))
    assert nats == pytest.approx(0.042475, abs=5e-7)
    assert nats / math.log(2) == pytest.approx(0.061278, abs=5e-7)


DISTRIBUTION = (
    st.lists(st.integers(0, 9), min_size=4, max_size=4)
    .filter(any)
    .map(lambda counts: np.array(counts) / sum(counts))
)


@given(first=DISTRIBUTION, second=DISTRIBUTION)
def test_divergence_is_symmetric_and_bounded(
    first: np.ndarray[tuple[int], np.dtype[np.float64]],
    second: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> None:
    there, back = js_divergence(first, second), js_divergence(second, first)
    assert there == pytest.approx(back)
    assert -1e-12 <= there <= math.log(2) + 1e-12
    assert js_divergence(first, first) == 0


def test_layers_that_the_prompt_did_not_use_do_not_count() -> None:
    predicted = ActivationProfile(np.array([[1, 0], [1, 0]], np.float32))
    observed = ActivationProfile(np.array([[0, 0], [0, 1]], np.float32))
    assert profile_divergence(predicted, observed) == pytest.approx(math.log(2))
