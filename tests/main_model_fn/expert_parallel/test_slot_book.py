"""Who holds which replica: no expert is ever lost, no slot is read while it is written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from main_model_fn.expert_parallel.balancer import next_placement
from main_model_fn.expert_parallel.replica_store import SlotBook
from remoe.moeless.baselines import expert_parallel
from remoe.moeless.placement import Placement

_RANKS, _EXPERTS, _SLOTS = 3, 6, 3


def _placement(pairs: list[tuple[int, int]]) -> Placement:
    expert, gpu = (np.array(column, np.intp) for column in zip(*pairs, strict=True))
    return Placement.of(expert, gpu, _RANKS)


_wanted = st.lists(
    st.lists(st.integers(0, _RANKS - 1), min_size=1, max_size=3),
    min_size=_EXPERTS,
    max_size=_EXPERTS,
).map(lambda where: _placement([(e, rank) for e, ranks in enumerate(where) for rank in ranks]))


@given(st.lists(_wanted, min_size=1, max_size=8))
def test_every_expert_is_served_from_where_its_weights_are(changes: list[Placement]) -> None:
    book = SlotBook(expert_parallel(_EXPERTS, _RANKS), slots=_SLOTS)
    for wanted in changes:
        before = {rank: book.held(rank) for rank in range(_RANKS)}
        placement, moves = book.change(wanted)
        assert set(placement.expert.tolist()) == set(range(_EXPERTS))
        for expert, rank in zip(placement.expert.tolist(), placement.gpu.tolist(), strict=True):
            assert expert in book.held(rank)
        for move in moves:
            assert move.expert in before[move.source]
        written = {(move.target, move.target_slot) for move in moves}
        assert len(written) == len(moves)
        assert not written & {(move.source, move.source_slot) for move in moves}


def test_what_is_no_longer_wanted_stays_warm_until_its_slot_is_needed() -> None:
    book = SlotBook(_placement([(e, e // 2) for e in range(6)]), slots=3)
    both = _placement([(e, e // 2) for e in range(6)] + [(0, 1)])
    assert len(book.change(both)[1]) == 1
    book.change(_placement([(e, e // 2) for e in range(6)]))
    assert 0 in book.held(1)
    assert book.change(both)[1] == []


def test_more_experts_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit the 1 slots of rank 0"):
        SlotBook(expert_parallel(_EXPERTS, _RANKS), slots=1)


def test_a_hot_expert_gets_replicas_and_an_even_load_keeps_what_is() -> None:
    current = expert_parallel(_EXPERTS, _RANKS)
    hot = np.array([60.0, 5, 5, 5, 5, 5])
    found = next_placement(hot, current, warm=current, slots=_SLOTS)
    assert found.replicas(_EXPERTS)[0] == _RANKS
    assert found.gpu_loads(hot).max() < 1.1 * hot.sum() / _RANKS
    even = np.full(6, 10.0)
    assert next_placement(even, current, warm=current, slots=_SLOTS) is current
