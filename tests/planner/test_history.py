from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.history import OBSERVED_TOPIC, History
from planner.history_store import Entry, HistoryIdentity, HistoryStore
from planner.selection import select_remote
from remoe.experts import ActivationProfile

FIRST = ActivationProfile(np.array([[1, 0]], np.float32))
SECOND = ActivationProfile(np.array([[0, 1]], np.float32))
SMALL = HistoryIdentity("sha256:model", "token-table", 2, 1, 2)


def direction(angle: float) -> NDArray[np.float32]:
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def entries(count: int, *, decode: bool = True) -> Iterator[Entry]:
    for i in range(count):
        yield Entry(
            id=i,
            vector=direction(i + 1),
            prefill=FIRST.shares,
            decode=FIRST.shares,
            n_tokens=10,
            decode_tokens=0,
            demand=1,
            decoded=float(decode),
            topic="algebra/rings",
            first_seen_s=0,
            last_seen_s=0,
        )


def shipped(count: int, capacity: int, *, decode: bool = True) -> History:
    history = History(HistoryStore(SMALL), capacity=capacity)
    history.absorb(entries(count, decode=decode), digest="file")
    return history


def empty(capacity: int = 10, path: Path | None = None) -> History:
    return History(HistoryStore.open(path, SMALL), capacity=capacity)


def prefill_of(history: History, row: int) -> NDArray[np.float32]:
    shares: NDArray[np.float32] = history.profiles([row])[0, 0]
    return shares


def decode_of(history: History, row: int) -> NDArray[np.float32]:
    shares: NDArray[np.float32] = history.profiles([row])[0, 1]
    return shares


def test_an_observed_prompt_is_found_again() -> None:
    history = shipped(2, capacity=5)
    assert history.add(direction(0.5), SECOND, FIRST, 7) == (2, False)
    assert len(history) == 3
    np.testing.assert_array_equal(history.vectors[2], direction(0.5))
    np.testing.assert_array_equal(prefill_of(history, 2), SECOND.shares)
    np.testing.assert_array_equal(decode_of(history, 2), FIRST.shares)
    assert history.set_counts() == {"algebra": 2, OBSERVED_TOPIC: 1}
    assert (history.topic_count(), history.shipped) == (1, 2)


def test_a_known_prompt_gains_demand_instead_of_an_entry() -> None:
    history = shipped(2, capacity=5)
    assert history.add(direction(1), SECOND, SECOND, 10) == (0, True)
    assert (len(history), history.seen_again) == (2, 1)
    np.testing.assert_allclose(prefill_of(history, 0), [[0.5, 0.5]])
    # Demand 2 of profile (1/2, 1/2) beside demand 1 of (1, 0).
    np.testing.assert_allclose(history.mean_profiles().prefill.shares, [[2 / 3, 1 / 3]], atol=1e-6)


def test_decoding_is_learnt_from_what_was_decoded_only() -> None:
    history = shipped(2, capacity=5)
    # Nothing decoded: the prefill's profile stands in, until there is something to learn from.
    history.add(direction(2.5), SECOND, None, 7)
    np.testing.assert_array_equal(decode_of(history, 2), SECOND.shares)
    history.add(direction(2.5), SECOND, FIRST, 7, decode_tokens=8)
    np.testing.assert_array_equal(decode_of(history, 2), FIRST.shares)
    history.add(direction(2.5), SECOND, None, 7)
    np.testing.assert_array_equal(decode_of(history, 2), FIRST.shares)
    history.add(direction(2.5), SECOND, SECOND, 7, decode_tokens=4, at_s=30.0)
    np.testing.assert_array_equal(decode_of(history, 2), [[0.5, 0.5]])
    np.testing.assert_array_equal(prefill_of(history, 2), SECOND.shares)
    entry = history.store.entry(2)
    assert (entry.demand, entry.decoded, entry.decode_tokens) == (4, 2, 6)
    assert (entry.first_seen_s, entry.last_seen_s) == (0, 30)


@pytest.mark.parametrize(("known", "mean"), [(True, [0.5, 0.5]), (False, [0, 1])])
def test_an_old_file_s_stand_in_gives_way_to_an_observation(known: bool, mean: list[float]) -> None:
    history = shipped(2, capacity=5, decode=known)
    np.testing.assert_array_equal(decode_of(history, 0), FIRST.shares)
    history.add(direction(1), FIRST, SECOND, 10)
    np.testing.assert_array_equal(decode_of(history, 0), [mean])


def test_prefill_is_weighted_by_length_and_decode_is_not() -> None:
    history = empty()
    history.add(direction(0), FIRST, SECOND, 30)
    history.add(direction(1), SECOND, FIRST, 10)
    history.add(direction(1), SECOND, FIRST, 10)
    means = history.mean_profiles()
    np.testing.assert_allclose(means.prefill.shares, [[30 / 50, 20 / 50]], atol=1e-6)
    np.testing.assert_allclose(means.decode.shares, [[2 / 3, 1 / 3]], atol=1e-6)
    assert history.mean_prompt_tokens == pytest.approx(50 / 3)


def test_float16_storage_does_not_make_a_prompt_new() -> None:
    vector = np.random.default_rng(0).standard_normal(576).astype(np.float32)
    vector /= np.linalg.norm(vector)
    stored = vector.astype(np.float16).astype(np.float32)
    history = History.in_memory(dimension=576, layers=1, experts=2, capacity=3)
    history.add(stored / np.linalg.norm(stored), FIRST, FIRST, 9)
    assert history.add(vector, FIRST, FIRST, 9) == (0, True)


def test_a_prompt_of_another_length_is_another_prompt() -> None:
    history = shipped(2, capacity=5)
    assert history.add(direction(1), SECOND, SECOND, 20) == (2, False)


def test_a_file_is_taken_in_once() -> None:
    history = shipped(3, capacity=5)
    history.absorb(entries(3), digest="file")
    assert history.demand.tolist() == [1, 1, 1]
    history.absorb(entries(4), digest="another")
    assert history.demand.tolist() == [2, 2, 2, 1]


def test_a_restarted_planner_knows_what_was_observed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.sqlite"
    history = empty(path=path)
    assert history.store.durable
    history.absorb(entries(2), digest="file")
    history.add(direction(0.5), SECOND, FIRST, 7, decode_tokens=12, at_s=5.0)
    history.add(direction(0.5), SECOND, FIRST, 7, decode_tokens=12, at_s=9.0)
    before, means = list(history.store.entries()), history.mean_profiles()
    history.store.close()
    again = empty(path=path)
    for old, new in zip(before, again.store.entries(), strict=True):
        np.testing.assert_array_equal(old.vector, new.vector)
        np.testing.assert_array_equal(old.decode, new.decode)
        assert (old.id, old.demand, old.topic) == (new.id, new.demand, new.topic)
    assert again.demand.tolist() == [1, 1, 2]
    np.testing.assert_allclose(again.mean_profiles().decode.shares, means.decode.shares, atol=1e-6)
    assert again.add(direction(0.5), SECOND, FIRST, 7) == (2, True)
    again.absorb(entries(2), digest="file")
    assert again.demand.tolist() == [1, 1, 3]
    assert again.add(direction(2.9), FIRST, None, 8) == (3, False)
    again.store.close()


def test_a_lowered_capacity_folds_what_is_too_much(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    history = empty(path=path)
    for i in range(9):
        history.add(direction(0.3 * i), FIRST, None, 10 + i)
    history.store.close()
    smaller = empty(4, path)
    assert (len(smaller), smaller.demand.sum()) == (4, 9)
    assert len(list(smaller.store.entries())) == 4
    # An id that is gone is never given again.
    assert smaller.add(direction(-2), FIRST, None, 99)[0] == 9
    smaller.store.close()


angles = st.lists(st.floats(0, 6.25), min_size=1, max_size=50)


@given(prompts=angles, capacity=st.integers(1, 8), shipped_count=st.integers(0, 4))
def test_no_demand_is_lost_and_no_id_given_twice(
    prompts: list[float], capacity: int, shipped_count: int
) -> None:
    history = shipped(shipped_count, capacity + shipped_count)
    new_ids = []
    for number, prompt in enumerate(prompts):
        entry, known = history.add(direction(prompt), SECOND, FIRST, 100 + number % 7)
        assert entry in history.ids
        if not known and entry not in new_ids and entry >= shipped_count:
            new_ids.append(entry)
    assert len(history) <= history.capacity
    assert new_ids == sorted(set(new_ids))
    assert len(set(history.ids.tolist())) == len(history)
    assert history.demand.sum() == shipped_count + len(prompts)
    stored = list(history.store.entries())
    assert sorted(entry.id for entry in stored) == sorted(history.ids.tolist())
    # The running sums are those of what is stored.
    decode = np.sum([entry.demand * entry.decode for entry in stored], axis=0)
    np.testing.assert_allclose(
        history.mean_profiles().decode.shares, decode / decode.sum(), atol=1e-5
    )


@given(prompts=angles, capacity=st.integers(2, 8))
def test_a_full_history_s_closest_prompts_never_get_closer(
    prompts: list[float], capacity: int
) -> None:
    history = empty(capacity)
    closest = -1.0
    for number, prompt in enumerate(prompts):
        history.add(direction(prompt), FIRST, None, number + 1)
        if number + 1 >= capacity:
            similarity = history.vectors @ history.vectors.T
            np.fill_diagonal(similarity, -1)
            if number + 1 > capacity:
                assert similarity.max() <= closest + 1e-6
            closest = float(similarity.max())


def test_a_flood_of_like_prompts_leaves_the_others_alone() -> None:
    chance = np.random.default_rng(0)
    history = History.in_memory(dimension=64, layers=1, experts=2, capacity=200)
    apart = chance.standard_normal((100, 64)).astype(np.float32)
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    rare = [history.add(vector, FIRST, None, 10)[0] for vector in apart]
    for number in range(600):
        near = apart[0] + 0.05 * chance.standard_normal(64).astype(np.float32)
        history.add(near / np.linalg.norm(near), SECOND, None, 20 + number % 90)
    kept = set(history.ids.tolist())
    assert len(history) == 200
    assert sum(entry in kept for entry in rare[1:]) == 99


def test_an_empty_history_is_uniform_where_there_are_experts() -> None:
    history = History.in_memory(dimension=2, layers=3, experts=4, capacity=1, moe_layers=(1, 2))
    profiles = history.mean_profiles()
    assert profiles.prefill.shares.tolist() == [[0] * 4, [0.25] * 4, [0.25] * 4]
    assert select_remote(profiles.mixed(10, 10), 0.5).remote == ((), (2, 3), (2, 3))
