"""The paper's equations against its worked example: F.1's golden vector, every line of it."""

from __future__ import annotations

import numpy as np
import pytest

from planner.optimise.expert_times import ExpertTimes
from planner.optimise.paper_model import Configuration, Routes, evaluate_as_printed
from planner.optimise.replicas import grow_replicas
from planner.optimise.specs import proportional
from planner.optimise.system import System

# F.1 prices a MB and second at 1, so a GB and second at 1000.
SYSTEM = System(
    experts=4,
    top_k=2,
    moe_layers=(0,),
    token_bytes=0.01e6,
    bandwidth_bytes_per_s=10e6,
    invocation_s=0.005,
    non_expert_rows=(4.0,),
    non_expert_s=(0.04,),
    non_expert_step_s=0.01,
    move_s_per_token=0.0001,
    expert_times=ExpertTimes.linear(0.01),
    remote=proportional([1.0], usd_per_gb_s=1000.0),
    main=proportional([3.0], usd_per_gb_s=1000.0),
    expert_gb=0.0,
    expert_runtime_gb=0.0,
    main_fixed_gb=3.0,
    gpu_fixed_gb=0.5,
    kv_gb_per_token=0.0,
    kv_on_gpu=True,
    gpu_usd_per_gb_s=3000.0,
)
ROUTES = Routes(
    prompt_tokens=4,
    decode_tokens=2,
    prefill=np.array([[4.0, 2, 1, 1]]),
    decode=np.array([[[1.0, 0, 1, 0]], [[1.0, 1, 0, 0]]]),
)


def configuration(replicas: int) -> Configuration:
    remote = np.array([[False, False, True, True]])
    return Configuration(remote, np.array([0]), np.array([replicas]), main=0)


@pytest.mark.parametrize(
    ("replicas", "prefill_s", "main_usd", "remote_prefill_usd", "total"),
    [(1, 0.0698, 514.2, 29, 560.2), (2, 0.0608, 473.7, 34, 524.7)],
)
def test_the_golden_vector_of_time_and_cost(
    replicas: int, prefill_s: float, main_usd: float, remote_prefill_usd: float, total: float
) -> None:
    estimate = evaluate_as_printed(SYSTEM, configuration(replicas), ROUTES)
    assert estimate.prefill_s == pytest.approx(prefill_s, rel=1e-9)
    assert estimate.decode_s == pytest.approx(0.044467, abs=5e-7)
    assert estimate.tpot_s == pytest.approx(0.022233, abs=5e-7)
    assert estimate.main_usd == pytest.approx(main_usd, rel=1e-6)
    assert estimate.remote_prefill_usd == pytest.approx(remote_prefill_usd, rel=1e-9)
    assert estimate.remote_decode_usd == pytest.approx(17, rel=1e-9)
    assert estimate.cost_usd == pytest.approx(total, rel=1e-6)


def test_the_second_replica_pays_for_itself() -> None:
    estimates = [evaluate_as_printed(SYSTEM, configuration(z), ROUTES) for z in (1, 2, 3)]
    cost = np.array([[estimate.cost_usd] for estimate in estimates])
    assert cost[0, 0] - cost[1, 0] == pytest.approx(35.5, abs=1e-9)
    seconds = np.array([[estimate.prefill_s] for estimate in estimates])
    # A third would have nothing to do and cost an invocation.
    assert grow_replicas(cost, seconds, np.array([1]), budget_s=1.0).tolist() == [2]


def test_all_local_costs_what_the_mix_baseline_does() -> None:
    nothing_remote = Configuration(np.zeros((1, 4), np.bool_), np.array([0]), np.array([1]), main=0)
    estimate = evaluate_as_printed(SYSTEM, nothing_remote, ROUTES)
    # 8 assignments and 4 decoded ones at 10/3 ms, τ^f, and the moves of 4 and 2 x 2 tokens.
    prefill_s = 0.04 + 8 * 0.01 / 3 + 2 * 4e-4
    decode_s = 2 * (0.01 + 2 * 0.01 / 3 + 2 * 2e-4)
    assert estimate.prefill_s == pytest.approx(prefill_s)
    assert estimate.decode_s == pytest.approx(decode_s)
    assert estimate.cost_usd == pytest.approx((prefill_s + decode_s) * 4500)
    assert estimate.remote_usd == 0


def test_a_token_is_counted_once_for_each_remote_expert() -> None:
    one, two = (
        evaluate_as_printed(SYSTEM, configuration(z), ROUTES).largest_payload_bytes for z in (1, 2)
    )
    assert (one, two) == (2 * 0.01e6, 0.01e6)
