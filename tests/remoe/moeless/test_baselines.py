"""What MoEless is compared with: EPLB, plain expert parallelism, and the Oracle."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoe.moeless.baselines import expert_parallel, moved_by_oracle, oracle_loads
from remoe.moeless.eplb import balanced_packing, eplb


def test_expert_parallelism_puts_experts_in_blocks() -> None:
    assert expert_parallel(8, 4).gpu.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert expert_parallel(4, 8).gpu.tolist() == [0, 1, 2, 3]
    assert expert_parallel(5, 2).gpu.tolist() == [0, 0, 0, 1, 1]
    assert expert_parallel(5, 2).gpu_loads(np.ones(5)).tolist() == [3, 2]


def test_oracle_spreads_evenly_and_says_what_that_moves() -> None:
    loads = np.array([6.0, 2, 0, 0])
    assert oracle_loads(loads).tolist() == [2, 2, 2, 2]
    assert moved_by_oracle(loads) == 0.5
    assert moved_by_oracle(np.zeros(4)) == 0


def test_packing_fills_every_pack_alike() -> None:
    pack = balanced_packing(np.array([9.0, 1, 5, 5, 1, 3]), 2)
    assert np.bincount(pack).tolist() == [3, 3]
    # 9 to pack 0; both fives to pack 1 (5, then 10 is not lighter than 9: pack 0 gets the second).
    assert pack.tolist() == [0, 1, 1, 1, 0, 0]


def test_packing_unevenly_is_refused() -> None:
    with pytest.raises(ValueError, match="5 items"):
        balanced_packing(np.ones(5), 2)


def test_redundant_experts_go_to_the_most_loaded() -> None:
    placement = eplb(np.array([80.0, 10, 5, 5]), slots=8, gpus=4)
    assert placement.replicas(4).tolist() == [5, 1, 1, 1]
    assert np.bincount(placement.gpu).tolist() == [2, 2, 2, 2]
    # 16 five times, 10, 5, 5: sixteens on all four GPUs first, the fifth beside one of them.
    assert sorted(placement.gpu_loads(np.array([80.0, 10, 5, 5]))) == [21, 21, 26, 32]


def test_hierarchical_balance_keeps_a_group_within_a_node() -> None:
    loads = np.array([90.0, 40, 61, 104, 39, 4, 73, 56, 183, 86, 49, 21])
    placement = eplb(loads, slots=16, gpus=8, groups=4, nodes=2)
    node_of = placement.gpu // 4
    for group in range(4):
        of_group = np.isin(placement.expert, range(group * 3, group * 3 + 3))
        assert len(set(node_of[of_group].tolist())) == 1
    assert placement.replicas(12).min() == 1
    assert np.bincount(placement.gpu).tolist() == [2] * 8


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 3))
def test_every_expert_is_placed_and_every_slot_is_filled(
    tokens: list[int], gpus: int, more: int
) -> None:
    slots = gpus * (-(-len(tokens) // gpus) + more)
    placement = eplb(np.array(tokens, np.float64), slots=slots, gpus=gpus)
    assert placement.replicas(len(tokens)).min() >= 1
    assert np.bincount(placement.gpu, minlength=gpus).tolist() == [slots // gpus] * gpus


def test_slots_that_cannot_be_filled_are_refused() -> None:
    for slots, gpus in [(3, 1), (5, 2)]:
        with pytest.raises(ValueError, match=f"{slots} slots do not do for 4 experts"):
            eplb(np.ones(4), slots=slots, gpus=gpus)
    with pytest.raises(ValueError, match="divide by 4 groups"):
        eplb(np.ones(6), slots=8, gpus=4, groups=4, nodes=2)


def test_packing_is_near_the_best_of_all() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        weights = random.integers(1, 50, 6).astype(float)
        best = min(
            max(sum(weights[list(half)]), weights.sum() - sum(weights[list(half)]))
            for half in itertools.combinations(range(6), 3)
        )
        packed = np.bincount(balanced_packing(weights, 2), weights).max()
        assert packed <= 4 / 3 * best
