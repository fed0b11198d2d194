from __future__ import annotations

import numpy as np
import pytest

from planner.remote_calls import call_chance_by_count, remote_call_chance


@pytest.mark.parametrize(
    ("experts", "top_k", "concentration"), [(8, 2, 0.3), (64, 6, 1.0), (40, 1, 0.1)]
)
def test_one_pass_agrees_with_each_partition_by_itself(
    experts: int, top_k: int, concentration: float
) -> None:
    rng = np.random.default_rng(experts)
    shares = -np.sort(-rng.dirichlet(np.full(experts, concentration), 5), axis=1)
    counts = np.array([0, 1, experts // 4, experts // 2, experts - 1, experts])
    together = call_chance_by_count(shares, top_k, counts)
    for column, count in enumerate(counts):
        remote = np.zeros(shares.shape, np.bool_)
        remote[:, experts - count :] = True
        alone = remote_call_chance(shares, remote, top_k)
        assert together[:, column] == pytest.approx(alone, abs=6e-3)


def test_more_remote_experts_never_make_a_call_less_likely() -> None:
    shares = -np.sort(-np.random.default_rng(1).dirichlet(np.full(16, 0.5), 9), axis=1)
    chances = call_chance_by_count(shares, 4, np.arange(17))
    assert (np.diff(chances, axis=1) >= -1e-6).all()
    assert chances[:, 0] == pytest.approx(0)
    assert chances[:, -1] == pytest.approx(1, abs=1e-4)
