from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.history import OBSERVED_TOPIC, History, HistoryEntries
from planner.selection import select_remote
from remoe.experts import ActivationProfile

FIRST = ActivationProfile(np.array([[1, 0]], np.float32))
SECOND = ActivationProfile(np.array([[0, 1]], np.float32))


def direction(angle: float) -> NDArray[np.float32]:
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def shipped(count: int, capacity: int, *, decode: bool = True) -> History:
    entries = HistoryEntries(
        vectors=np.stack([direction(i + 1) for i in range(count)]),
        profiles=np.tile(FIRST.shares, (count, 1, 1)),
        decode_profiles=np.tile(FIRST.shares, (count, 1, 1)) if decode else None,
        n_tokens=np.full(count, 10, np.int32),
        topic=np.zeros(count, np.int32),
        topics=("algebra",),
    )
    return History.of(entries, capacity=capacity)


def test_an_observed_prompt_is_found_in_the_arrays() -> None:
    history = shipped(2, capacity=5)
    assert history.add(direction(0.5), SECOND, FIRST, 7) == (2, False)
    assert len(history) == 3
    np.testing.assert_array_equal(history.vectors[2], direction(0.5))
    np.testing.assert_array_equal(history.profiles[2], SECOND.shares)
    np.testing.assert_array_equal(history.decode_profiles[2], FIRST.shares)
    assert history.set_counts() == {"algebra": 2, OBSERVED_TOPIC: 1}
    assert history.topic_count() == 1


def test_a_known_prompt_gains_demand_instead_of_an_entry() -> None:
    history = shipped(2, capacity=5)
    assert history.add(direction(1), SECOND, SECOND, 10) == (0, True)
    assert (len(history), history.duplicates) == (2, 1)
    np.testing.assert_allclose(history.profiles[0], [[0.5, 0.5]])
    # Demand 2 of profile (1/2, 1/2) beside demand 1 of (1, 0).
    np.testing.assert_allclose(history.mean_profiles().prefill.shares, [[2 / 3, 1 / 3]], atol=1e-6)


def test_decoding_is_learnt_from_what_was_decoded_only() -> None:
    history = shipped(2, capacity=5)
    # Nothing decoded: the prefill's profile stands in, until there is something to learn from.
    history.add(direction(2.5), SECOND, None, 7)
    np.testing.assert_array_equal(history.decode_profiles[2], SECOND.shares)
    history.add(direction(2.5), SECOND, FIRST, 7)
    np.testing.assert_array_equal(history.decode_profiles[2], FIRST.shares)
    history.add(direction(2.5), SECOND, None, 7)
    np.testing.assert_array_equal(history.decode_profiles[2], FIRST.shares)
    history.add(direction(2.5), SECOND, SECOND, 7)
    np.testing.assert_array_equal(history.decode_profiles[2], [[0.5, 0.5]])
    np.testing.assert_array_equal(history.profiles[2], SECOND.shares)


@pytest.mark.parametrize(("known", "mean"), [(True, [0.5, 0.5]), (False, [0, 1])])
def test_an_old_file_s_stand_in_gives_way_to_an_observation(known: bool, mean: list[float]) -> None:
    history = shipped(2, capacity=5, decode=known)
    np.testing.assert_array_equal(history.decode_profiles[0], FIRST.shares)
    history.add(direction(1), FIRST, SECOND, 10)
    np.testing.assert_array_equal(history.decode_profiles[0], [mean])


def test_prefill_is_weighted_by_length_and_decode_is_not() -> None:
    history = History(hidden_size=2, layers=1, experts=2, capacity=4)
    history.add(direction(0), FIRST, SECOND, 30)
    history.add(direction(1), SECOND, FIRST, 10)
    history.add(direction(1), SECOND, FIRST, 10)
    means = history.mean_profiles()
    np.testing.assert_allclose(means.prefill.shares, [[30 / 50, 20 / 50]], atol=1e-6)
    np.testing.assert_allclose(means.decode.shares, [[2 / 3, 1 / 3]], atol=1e-6)
    assert history.mean_prompt_tokens == pytest.approx(50 / 3)


def test_a_slot_that_is_used_again_keeps_nothing_of_its_last_prompt() -> None:
    history = shipped(1, capacity=2)
    history.add(direction(2), FIRST, SECOND, 7)
    history.add(direction(3), FIRST, None, 8)
    np.testing.assert_array_equal(history.decode_profiles[1], FIRST.shares)


def test_float16_storage_does_not_make_a_prompt_new() -> None:
    vector = np.random.default_rng(0).standard_normal(576).astype(np.float32)
    vector /= np.linalg.norm(vector)
    stored = vector.astype(np.float16).astype(np.float32)
    history = History(hidden_size=576, layers=1, experts=2, capacity=3)
    history.add(stored / np.linalg.norm(stored), FIRST, FIRST, 9)
    assert history.add(vector, FIRST, FIRST, 9) == (0, True)


def test_a_prompt_of_another_length_is_another_prompt() -> None:
    history = shipped(2, capacity=5)
    assert history.add(direction(1), SECOND, SECOND, 20) == (2, False)


def test_the_oldest_observed_entry_makes_room_and_shipped_ones_stay() -> None:
    history = shipped(2, capacity=4)
    for i in range(5):
        history.add(direction(0.1 * i), SECOND, None, 50 + i)
    assert sorted(history.ids.tolist()) == [0, 1, 5, 6]
    assert (len(history), history.dropped) == (4, 3)
    assert history.topic(0) == history.topic(1) == "algebra"


@given(
    prompts=st.lists(st.integers(0, 12), max_size=60),
    capacity=st.integers(1, 8),
    shipped_count=st.integers(0, 4),
)
def test_the_history_never_outgrows_its_capacity_nor_repeats_an_id(
    prompts: list[int], capacity: int, shipped_count: int
) -> None:
    history = (
        shipped(shipped_count, capacity + shipped_count)
        if shipped_count
        else (History(hidden_size=2, layers=1, experts=2, capacity=capacity))
    )
    new_ids = []
    for prompt in prompts:
        entry, known = history.add(direction(0.07 * prompt), FIRST, None, 100 + prompt)
        assert entry in history.ids
        if not known:
            new_ids.append(entry)
    assert len(history) <= history.capacity
    assert new_ids == sorted(set(new_ids))
    assert len(set(history.ids.tolist())) == len(history)
    assert len(history) + history.dropped == shipped_count + len(new_ids)
    assert history.duplicates == len(prompts) - len(new_ids)


def test_shipped_entries_must_leave_room() -> None:
    with pytest.raises(ValueError, match="3 shipped entries do not fit"):
        shipped(3, capacity=3)


def test_an_empty_history_is_uniform_where_there_are_experts() -> None:
    history = History(hidden_size=2, layers=3, experts=4, capacity=1, moe_layers=(1, 2))
    profiles = history.mean_profiles()
    assert profiles.prefill.shares.tolist() == [[0] * 4, [0.25] * 4, [0.25] * 4]
    assert select_remote(profiles.mixed(10, 10), 0.5).remote == ((), (2, 3), (2, 3))
