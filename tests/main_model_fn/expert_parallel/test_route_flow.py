"""Routes from ranks to replicas: all arrive, evenly, and near if they can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from main_model_fn.expert_parallel.route_flow import route_flow
from main_model_fn.expert_parallel.segments import reordered
from remoe.moeless.placement import Placement


@st.composite
def _cases(draw: st.DrawFn) -> tuple[np.ndarray, Placement]:
    ranks, experts = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, 40), min_size=ranks * experts, max_size=ranks * experts))
    where = [
        draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=4)) for _ in range(experts)
    ]
    expert = np.repeat(np.arange(experts), [len(one) for one in where])
    gpu = np.array([rank for one in where for rank in one], np.intp)
    return np.array(counts, np.intp).reshape(ranks, experts), Placement.of(expert, gpu, ranks)


@given(_cases())
def test_every_route_goes_to_one_replica_of_its_expert(case: tuple[np.ndarray, Placement]) -> None:
    counts, placement = case
    flow = route_flow(counts, placement)
    assert flow.min(initial=0) >= 0
    for expert in range(counts.shape[1]):
        own = flow[:, placement.expert == expert]
        assert np.array_equal(own.sum(axis=1), counts[:, expert])


@given(_cases())
def test_replicas_of_an_expert_get_the_same_give_or_take_one(
    case: tuple[np.ndarray, Placement],
) -> None:
    counts, placement = case
    arriving = route_flow(counts, placement).sum(axis=0)
    for expert in range(counts.shape[1]):
        own = arriving[placement.expert == expert]
        assert own.max() - own.min() <= 1


def test_routes_stay_on_their_rank_as_far_as_its_replica_has_room() -> None:
    placement = Placement(np.array([0, 0]), np.array([0, 1]), 2)
    flow = route_flow(np.array([[30], [10]]), placement)
    assert flow.tolist() == [[20, 10], [0, 10]]


def test_an_expert_with_routes_and_no_replica_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"experts \[1\] have routes and no replica"):
        route_flow(np.array([[3, 4]]), Placement(np.array([0]), np.array([0]), 1))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_segments_are_put_into_another_order(sizes: list[int], random: object) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = [(segment, row) for segment, size in enumerate(sizes) for row in range(size)]
    index = reordered(np.array(sizes), np.array(order), torch.device("cpu"))
    expected = [(segment, row) for segment in order for row in range(sizes[segment])]
    assert [rows[i] for i in index.tolist()] == expected
