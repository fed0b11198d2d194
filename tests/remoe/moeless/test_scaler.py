"""The scaler: papers.md F.3, and what must hold for any loads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from remoe.moeless.scaler import added_within, load_cv, scale

Loads = NDArray[np.float64]
loads_of_layers = st.lists(
    st.one_of(st.just(0.0), st.floats(0.01, 1e6)), min_size=1, max_size=24
).map(np.array)
thresholds = st.floats(0, 2)


def _loads(*values: float) -> Loads:
    return np.array(values, np.float64)


@pytest.mark.parametrize(
    ("loads", "most_added", "replicas"),
    [
        ((40, 20, 20, 20), 100, [2, 1, 1, 1]),
        ((30, 25, 25, 20), 100, [1, 1, 1, 1]),
        ((80, 10, 5, 5), 100, [9, 1, 1, 1]),
        ((80, 10, 5, 5), 4, [5, 1, 1, 1]),
    ],
)
def test_replicas_are_those_of_the_golden_vectors(
    loads: tuple[float, ...], most_added: int, replicas: list[int]
) -> None:
    assert scale(_loads(*loads), most_added=most_added).tolist() == replicas


def test_cv_on_the_way_is_that_of_the_golden_vectors() -> None:
    loads = _loads(80, 10, 5, 5)
    cvs = [load_cv(loads, scale(loads, most_added=added, cv_threshold=None)) for added in range(9)]
    expected = [1.2728, 0.8216, 0.6083, 0.4743, 0.3795, 0.3082, 0.2535, 0.2121, 0.1826]
    assert cvs == pytest.approx(expected, abs=5e-5)
    assert load_cv(_loads(40, 20, 20, 20), np.ones(4, np.intp)) == pytest.approx(0.3464, abs=5e-5)
    assert load_cv(_loads(40, 20, 20, 20), np.array([2, 1, 1, 1])) == 0
    assert load_cv(_loads(30, 25, 25, 20), np.ones(4, np.intp)) == pytest.approx(0.1414, abs=5e-5)


def _as_printed(loads: Loads, most_added: int, threshold: float) -> list[int]:
    """Algorithm 1 word for word: every replica's load in a list, and the CV from scratch."""
    replicas = [1] * len(loads)
    for _ in range(most_added):
        each = np.repeat(loads / replicas, replicas)
        if each.mean() == 0 or each.std() / each.mean() <= threshold * (1 + 1e-7):
            break
        replicas[int((loads / replicas).argmax())] += 1
    return replicas


@given(st.lists(st.integers(0, 500), min_size=1, max_size=12), st.integers(0, 30), thresholds)
def test_heap_and_running_variance_do_what_algorithm_1_says(
    tokens: list[int], most_added: int, threshold: float
) -> None:
    loads = np.array(tokens, np.float64)
    expected = _as_printed(loads, most_added, threshold)
    got = scale(loads, most_added=most_added, cv_threshold=threshold * (1 + 1e-7))
    assert got.tolist() == expected


@given(loads_of_layers, st.integers(0, 40), thresholds, thresholds)
def test_cap_holds_and_a_larger_threshold_never_gives_more(
    loads: Loads, most_added: int, one: float, other: float
) -> None:
    strict, lenient = (
        scale(loads, most_added=most_added, cv_threshold=v) for v in sorted((one, other))
    )
    assert strict.sum() <= len(loads) + most_added
    assert np.all(lenient >= 1)
    assert np.all(lenient <= strict)


@given(loads_of_layers, st.integers(0, 40), thresholds)
def test_below_the_cap_the_threshold_is_reached(
    loads: Loads, most_added: int, threshold: float
) -> None:
    replicas = scale(loads, most_added=most_added, cv_threshold=threshold)
    if replicas.sum() < len(loads) + most_added:
        assert load_cv(loads, replicas) <= threshold + 1e-4


@given(loads_of_layers, st.integers(0, 40))
def test_scaling_to_zero_takes_replicas_from_idle_experts_alone(
    loads: Loads, most_added: int
) -> None:
    replicas = scale(loads, most_added=most_added, scale_to_zero=True)
    assert np.array_equal(replicas == 0, loads == 0)
    busy = loads[loads > 0]
    assert replicas[loads > 0].tolist() == scale(busy, most_added=most_added).tolist()


@given(loads_of_layers, st.integers(0, 40), st.floats(0.1, 1e5))
def test_loads_that_are_small_enough_are_not_split(
    loads: Loads, most_added: int, split_above: float
) -> None:
    replicas = scale(loads, most_added=most_added, split_above=split_above)
    assert np.all(replicas <= scale(loads, most_added=most_added))
    before = loads / np.maximum(replicas - 1, 1)  # a replica's load when the last one was added
    assert np.all(before[replicas > 1] > split_above)


def test_memory_cap_counts_added_replicas_only() -> None:
    assert added_within(1_000.0, 250.0) == 4
    assert added_within(1_000.0, 251.0) == 3


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_load_that_is_no_count_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="count the tokens"):
        scale(_loads(1, bad), most_added=1)


def test_loads_too_small_to_be_squared_vary_like_others() -> None:
    tiny = _loads(3e-200, 1e-200)
    assert load_cv(tiny, np.array([1, 1])) == pytest.approx(0.5)
