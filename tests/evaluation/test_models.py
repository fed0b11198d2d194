"""The modelled tables: hosts, requests' costs and fleets, where the answer is known."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from evaluation import scaling
from evaluation.cost_model import Case, Skew, concentration_of, cost_of_requests
from evaluation.fleet import Fleet, always_on, shared_batch, simulate_fleet
from evaluation.hosts import DEFAULT_HOST, load_host
from evaluation.shapes import SHAPES
from evaluation.workbench import Options, Workbench
from remoe.errors import SettingsError

HOST = load_host(DEFAULT_HOST)
OLMOE = SHAPES["OLMoE-1B-7B"]
SKEW = Skew(0.7, 0.7)


def test_shapes_are_as_large_as_published() -> None:
    billions = {
        name: (shape.experts_bytes + shape.non_expert_bytes) / 2e9 for name, shape in SHAPES.items()
    }
    assert billions["OLMoE-1B-7B"] == pytest.approx(6.92, rel=0.01)
    assert billions["DeepSeek-V2-Lite"] == pytest.approx(15.7, rel=0.01)
    assert billions["Mixtral-8x7B"] == pytest.approx(46.7, rel=0.01)


def test_the_measured_expert_takes_what_was_measured() -> None:
    times = HOST.expert_times(OLMOE)
    measured = times.seconds(np.array([1.0, 16.0, 512.0]), 16.0)
    np.testing.assert_allclose(measured, [0.31e-3, 0.35e-3, 2.0e-3], rtol=0.01)


def test_a_host_file_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    with pytest.raises(SettingsError, match="cannot read"):
        load_host(path)
    path.write_bytes(msgspec.json.encode({"name": "x"}))
    with pytest.raises(SettingsError, match="is an example"):
        load_host(path)
    figures = msgspec.to_builtins(HOST) | {"expert_s": [[1.0]]}
    path.write_bytes(msgspec.json.encode(figures))
    with pytest.raises(SettingsError, match="3 rows of 5 allocations"):
        load_host(path)


def test_the_concentration_of_drawn_shares_is_found_again() -> None:
    drawn = np.random.default_rng(0).dirichlet(np.full(16, 0.8), 20_000)
    assert concentration_of(drawn) == pytest.approx(0.8, rel=0.05)


def test_a_request_costs_memory_times_time() -> None:
    outcome = cost_of_requests(HOST, OLMOE, Case(), SKEW, requests=1)[0]
    mix, remoe = outcome.ways["MIX"], outcome.ways["Remoe"]
    seconds = mix.ttft_s + 200 * mix.tpot_s
    cpu_gb = OLMOE.experts_bytes / 1e9 + 1.0
    gpu_gb = OLMOE.non_expert_bytes / 1e9 + 325 * OLMOE.kv_bytes_per_token / 1e9
    # The main function's memory is sold in steps of 0.1 GB.
    assert mix.usd == pytest.approx(2.3e-5 * seconds * (cpu_gb + 3 * gpu_gb), rel=0.02)
    assert mix.meets_slo
    # Held functions cost what they hold; MIX has none.
    assert mix.resident_usd == mix.usd
    assert remoe.resident_usd > remoe.usd
    assert outcome.saving == pytest.approx(1 - remoe.usd / outcome.ways[outcome.best_baseline].usd)


def test_calls_that_cost_more_leave_fewer_experts_remote() -> None:
    shares = [
        cost_of_requests(HOST, OLMOE, Case(invocation_s=call_s), SKEW, requests=1)[0].remote_share
        for call_s in (1e-4, 5e-2)
    ]
    assert shares[1] < shares[0]


def test_a_dearer_gpu_favours_what_holds_less_of_it() -> None:
    def gpu_over_remoe(ratio: float) -> float:
        case = Case(gpu_price_ratio=ratio)
        ways = cost_of_requests(HOST, OLMOE, case, SKEW, requests=1)[0].ways
        return ways["GPU"].usd / ways["Remoe"].usd

    assert gpu_over_remoe(10.0) > gpu_over_remoe(1.8)


def test_streams_share_a_step_as_little_s_law_has_it() -> None:
    fleet = Fleet(experts_per_function=1, decode_tokens=100, tpot_s=0.5)
    # A step always takes 0.1 s: 2 requests/s x 100 tokens x 0.1 s are 20 in flight.
    assert shared_batch(lambda rows: 0.1, 2.0, fleet) == pytest.approx(20, rel=1e-3)
    assert shared_batch(lambda rows: 0.1, 1e-6, fleet) == 1
    # 10 ms a stream: 50 of them reach the limit, however many come.
    assert shared_batch(lambda rows: 0.01 * rows, 1e6, fleet) == pytest.approx(50, rel=1e-3)
    assert shared_batch(lambda rows: 1.0, 1e6, fleet) == 1


def test_a_fleet_sleeps_when_nobody_asks_and_grows_with_what_comes() -> None:
    shape, fleet = SHAPES["61 x 256"], Fleet(experts_per_function=16)
    rare, busy, busier = (
        simulate_fleet(HOST, shape, fleet, rate, requests=60) for rate in (1e-5, 10.0, 100.0)
    )
    assert rare.functions == busy.functions == 61 * 16
    assert rare.main_awake < 0.01
    assert rare.awake < 0.01 * rare.functions
    assert busy.awake > 0.9 * busy.functions
    # Ten times the load needs ten times the replicas, at the same price a token.
    assert busier.replicas == pytest.approx(10 * busy.replicas, rel=0.3)
    assert busier.usd_per_million_tokens == pytest.approx(busy.usd_per_million_tokens, rel=0.1)


def test_what_is_always_on_costs_the_same_however_few_ask() -> None:
    shape, fleet = SHAPES["61 x 256"], Fleet(experts_per_function=1)
    one, tenth = (always_on(HOST, shape, fleet, rate) for rate in (1e-4, 1e-5))
    assert tenth.usd_per_million_tokens == pytest.approx(10 * one.usd_per_million_tokens)


def test_the_scaling_table(tmp_path: Path) -> None:
    bench = Workbench(Options(out=tmp_path, model_dir=tmp_path, quick=True), "scaling")
    result = scaling.make(bench)
    fleets = result.series[0].named()
    assert len({row["requests_per_s"] for row in fleets}) == 3
    assert all(float(row["usd_per_million_tokens"] or 0) > 0 for row in fleets)
    first = fleets[0]
    assert float(first["usd_per_million_tokens"] or 0) < float(
        first["always_on_usd_per_million_tokens"] or 0
    )
