"""The placer and the token split: papers.md F.3, memory that is never exceeded, no token lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from remoe.moeless.placement import Placement
from remoe.moeless.placer import attach_missing, fit_replicas, place
from remoe.moeless.scaler import scale
from remoe.moeless.token_split import assign_routes, even_split

LOADS = np.array([80.0, 10, 5, 5])
REPLICAS = np.array([3, 1, 1, 1])


def _pairs(placement: Placement) -> list[tuple[int, int]]:
    return list(zip(placement.expert.tolist(), placement.gpu.tolist(), strict=True))


def test_nothing_warm_is_the_golden_vector() -> None:
    placement = place(LOADS, REPLICAS, 2)
    assert _pairs(placement) == [(0, 0), (0, 0), (0, 1), (1, 1), (2, 1), (3, 1)]
    assert placement.gpu_loads(LOADS) == pytest.approx([53.33, 46.67], abs=5e-3)


def test_warm_replicas_stay_as_in_the_golden_vector() -> None:
    warm = Placement(np.array([0, 0]), np.array([0, 0]), 2)
    placement = place(LOADS, REPLICAS, 2, warm=warm)
    assert _pairs(placement) == [(0, 0), (0, 0), (0, 1), (1, 1), (2, 1), (3, 1)]
    assert placement.gpu_loads(LOADS) == pytest.approx([53.33, 46.67], abs=5e-3)


def test_a_warm_place_serves_once_and_the_rest_join_the_shortest_queue() -> None:
    warm = Placement(np.array([0, 1]), np.array([1, 1]), 3)
    placement = place(np.array([60.0, 30]), np.array([3, 1]), 3, warm=warm)
    # Expert 0: the warm place on 1, then 0 and 2; expert 1 (30) goes first, to its warm place on 1.
    assert _pairs(placement) == [(0, 0), (0, 1), (0, 2), (1, 1)]


def test_warm_guard_refuses_to_pile_up() -> None:
    loads, replicas = np.array([50.0, 50]), np.array([1, 1])
    warm = Placement(np.array([0, 1]), np.array([0, 0]), 2)
    assert _pairs(place(loads, replicas, 2, warm=warm)) == [(0, 0), (1, 0)]
    assert _pairs(place(loads, replicas, 2, warm=warm, warm_slack=0.2)) == [(0, 0), (1, 1)]


def test_warm_replicas_on_a_gpu_that_is_gone_do_not_count() -> None:
    warm = Placement(np.array([0]), np.array([5]), 6)
    assert _pairs(place(np.array([1.0]), np.array([1]), 2, warm=warm)) == [(0, 0)]


def test_overflow_drops_the_replica_that_helps_least() -> None:
    # Without one of its two, expert 1 has 12 a replica; without one of its four, expert 0 has 20.
    fitted = fit_replicas(np.array([60.0, 12, 5]), np.array([4, 2, 1]), 6)
    assert fitted.tolist() == [4, 1, 1]


def test_too_little_memory_for_the_experts_themselves_is_said() -> None:
    with pytest.raises(ValueError, match="3 experts do not fit room for 2 replicas; add GPUs"):
        place(np.array([1.0, 1, 1]), np.array([1, 1, 1]), 2, room=[1, 1])


@st.composite
def layers(draw: st.DrawFn) -> tuple[NDArray[np.intp], int]:
    tokens = draw(st.lists(st.integers(0, 200), min_size=1, max_size=16))
    return np.array(tokens), draw(st.integers(1, 9))


@given(layers(), st.integers(0, 30), st.data())
def test_room_is_never_exceeded_and_nothing_is_lost(
    layer: tuple[NDArray[np.intp], int], most_added: int, data: st.DataObject
) -> None:
    tokens, gpus = layer
    loads = tokens.astype(np.float64)
    room = data.draw(st.lists(st.integers(0, 12), min_size=gpus, max_size=gpus))
    replicas = scale(loads, most_added=most_added, scale_to_zero=data.draw(st.booleans()))
    before = data.draw(
        st.lists(st.tuples(st.integers(0, len(loads) - 1), st.integers(0, gpus)), max_size=20)
    )
    warm = Placement(
        np.array([e for e, _ in before], np.intp), np.array([g for _, g in before], np.intp), gpus
    )
    if sum(room) < np.count_nonzero(replicas):
        with pytest.raises(ValueError, match="do not fit"):
            place(loads, replicas, gpus, warm=warm, room=room)
        return
    placement = place(loads, replicas, gpus, warm=warm, room=room)
    assert np.all(np.bincount(placement.gpu, minlength=gpus) <= room)
    placed = placement.replicas(len(loads))
    assert np.array_equal(placed, fit_replicas(loads, replicas, sum(room)))
    assert np.array_equal(placed > 0, replicas > 0)
    assert placement.gpu_loads(loads).sum() == pytest.approx(loads.sum())

    routes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(tokens)), tokens))
    assigned = assign_routes(routes, placement)
    assert np.array_equal(placement.expert[assigned], routes)  # the router's choices are kept
    sizes = np.bincount(assigned, minlength=len(placement.expert))
    for expert, count in enumerate(tokens.tolist()):
        of_expert = sizes[placement.expert == expert].tolist()
        assert sum(of_expert) == count
        if of_expert:
            assert of_expert == even_split(count, len(of_expert))
            assert max(of_expert) - min(of_expert) <= 1


def test_a_route_to_an_expert_without_a_replica_is_refused() -> None:
    placement = Placement(np.array([0]), np.array([0]), 1)
    with pytest.raises(ValueError, match=r"experts \[1\] have routes and no replica"):
        assign_routes(np.array([0, 1]), placement)
    with pytest.raises(ValueError, match=r"experts \[1\] have load and no replica"):
        placement.gpu_loads(np.array([1.0, 1.0]))
    assert assign_routes(np.array([], np.intp), placement).tolist() == []


def test_an_expert_at_zero_that_is_needed_after_all_gets_a_replica() -> None:
    placement = Placement(np.array([0, 0]), np.array([0, 1]), 3)
    loads = np.array([4.0, 0, 2, 1])
    warm = Placement(np.array([3]), np.array([1]), 3)
    assert _pairs(attach_missing(placement, loads, warm=warm)) == [(0, 0), (0, 1), (2, 2), (3, 1)]
    assert attach_missing(placement, np.array([1.0, 0, 0, 0])) is placement
