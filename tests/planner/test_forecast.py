from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.forecast import (
    USUAL_DECODE_TOKENS,
    Forecast,
    FunctionLoad,
    Workload,
    decode_tokens,
    forecast,
    function_loads,
)
from planner.measurements import Measurements
from planner.phases import PhaseProfiles
from planner.selection import select_remote
from remoe.experts import ActivationProfile, Partition
from remoe.plan import Slo
from remoe.prices import PriceBook
from remoe.topology import ExpertEndpoint
from tests.planner.worlds import same_in_both

PRICES = PriceBook(name="p", source="s", as_of="now", cpu_usd_per_gb_s=1.0, gpu_usd_per_gb_s=3.0)
KNOWN = Measurements(
    prefill_fixed_s=0.0,
    prefill_s_per_token=0.01,
    decode_s_per_token=0.1,
    remote_s_per_call=0.002,
    main_cpu_share=1.0,
    main_gpu_share=0.0,
    decode_tokens=20.0,
    requests=1,
)


def function(first: int, last: int, memory_gb: float = 0.5) -> ExpertEndpoint:
    return ExpertEndpoint(
        name=f"{first}-{last}", url="", first_layer=first, last_layer=last, memory_gb=memory_gb
    )


def test_routes_and_calls_of_a_worked_example() -> None:
    profile = ActivationProfile(
        np.array([[0.5, 0.25, 0.25, 0], [1, 0, 0, 0], [0, 0, 0.5, 0.5]], np.float32)
    )
    partition = Partition(experts=4, remote=((2, 3), (2, 3), (2, 3)))
    both, last = function_loads(
        same_in_both(profile),
        partition,
        [function(0, 1), function(2, 2)],
        Workload(3, 10),
        top_k=2,
    )
    # Layer 0 has a quarter of its routes remote, layer 1 none, layer 2 all; a token of layer 0
    # takes a remote expert half the time, since it never takes the same expert twice.
    assert both.routes == pytest.approx(2 * 0.25 * 13)
    assert both.calls == pytest.approx((1 - 0.5**3) + 10 * 0.5)
    assert last.routes == pytest.approx(2 * 13)
    assert last.calls == pytest.approx(1 + 10)


def test_each_phase_counts_with_its_own_profile() -> None:
    read = ActivationProfile(np.array([[0.5, 0.5, 0, 0]], np.float32))
    written = ActivationProfile(np.array([[0, 0, 0.5, 0.5]], np.float32))
    partition = Partition(experts=4, remote=((2, 3),))
    workload = Workload(7, 10)
    (load,) = function_loads(
        PhaseProfiles(read, written), partition, [function(0, 0)], workload, top_k=2
    )
    assert (load.routes, load.calls) == pytest.approx((2 * 10, 10))
    (load,) = function_loads(
        PhaseProfiles(written, read), partition, [function(0, 0)], workload, top_k=2
    )
    assert (load.routes, load.calls) == pytest.approx((2 * 7, 1))


@given(
    counts=arrays.arrays(np.int64, (4, 6), elements=st.integers(0, 9)),
    ratio=st.floats(0, 1),
    workload=st.builds(Workload, st.integers(1, 500), st.floats(0, 500)),
)
def test_calls_never_exceed_routes_nor_passes(
    counts: NDArray[np.int64], ratio: float, workload: Workload
) -> None:
    profile = ActivationProfile.from_counts(counts)
    partition = select_remote(profile, ratio)
    functions = [function(0, 0), function(1, 3)]
    loads = function_loads(same_in_both(profile), partition, functions, workload, top_k=2)
    for load in loads:
        layers = load.function.last_layer - load.function.first_layer + 1
        assert 0 <= load.calls <= layers * (1 + workload.decode_tokens) + 1e-9
        assert load.calls <= load.routes + 1e-3
        assert math.isfinite(load.routes)
    everywhere = [function(0, 3)]
    whole = function_loads(same_in_both(profile), partition, everywhere, workload, top_k=2)[0]
    assert sum(load.routes for load in loads) == pytest.approx(whole.routes)
    assert sum(load.calls for load in loads) == pytest.approx(whole.calls)


def test_cost_is_the_expected_ledger_at_the_price_book() -> None:
    loads = [FunctionLoad(function(0, 0, 0.5), 9, 4.0), FunctionLoad(function(1, 1, 2.0), 9, 1.0)]
    result = forecast(
        Workload(10, 5), loads, main_memory_gb=2.0, measured=KNOWN, prices=PRICES, slo=None
    )
    assert result.ttft_s == pytest.approx(0.1)
    assert result.tpot_s == pytest.approx(0.1)
    # 2 GB for 0.1 + 0.5 s, and 4 calls at 0.5 GB and one at 2 GB of 2 ms each.
    assert result.cost_usd == pytest.approx(2 * 0.6 + (4 * 0.5 + 1 * 2) * 0.002)
    assert result.feasible


def test_a_gpu_main_function_is_priced_as_one() -> None:
    measured = Measurements(
        prefill_fixed_s=0.04,
        prefill_s_per_token=0.006,
        main_cpu_share=0.0,
        main_gpu_share=0.5,
        requests=1,
    )
    result = forecast(
        Workload(10, 0), [], main_memory_gb=2.0, measured=measured, prices=PRICES, slo=None
    )
    assert result.cost_usd == pytest.approx(2 * 0.1 * 0.5 * 3.0)


def test_nothing_measured_means_nothing_forecast() -> None:
    loads = [FunctionLoad(function(0, 0), 9, 4.0)]
    slo = Slo(ttft_s=1e-9, tpot_s=1e-9)
    nothing = forecast(
        Workload(10, 5), loads, main_memory_gb=2, measured=Measurements(), prices=PRICES, slo=slo
    )
    assert nothing == Forecast(None, None, None, feasible=True)


@pytest.mark.parametrize(
    "missing",
    ["prefill_s_per_token", "decode_s_per_token", "remote_s_per_call", "main_cpu_share"],
)
def test_a_cost_with_an_unknown_part_is_not_forecast(missing: str) -> None:
    measured = Measurements(
        **{name: getattr(KNOWN, name) for name in KNOWN.__struct_fields__ if name != missing}
    )
    loads = [FunctionLoad(function(0, 0), 9, 4.0)]
    result = forecast(
        Workload(10, 5), loads, main_memory_gb=2, measured=measured, prices=PRICES, slo=None
    )
    assert result.cost_usd is None


@pytest.mark.parametrize(
    ("slo", "feasible"),
    [((0.11, 0.11), True), ((0.09, 0.11), False), ((0.11, 0.09), False)],
)
def test_a_plan_that_breaks_the_slo_is_infeasible(slo: tuple[float, float], feasible: bool) -> None:
    result = forecast(
        Workload(10, 5), [], main_memory_gb=2, measured=KNOWN, prices=PRICES, slo=Slo(*slo)
    )
    assert result.feasible is feasible


def test_decode_tokens_are_the_limit_or_the_observed_mean() -> None:
    assert decode_tokens(8, Measurements()) == 7
    assert decode_tokens(8000, Measurements()) == USUAL_DECODE_TOKENS
    assert decode_tokens(None, Measurements()) == USUAL_DECODE_TOKENS
    assert decode_tokens(None, KNOWN) == 20
    assert decode_tokens(8, KNOWN) == 7
    assert decode_tokens(100, KNOWN) == 20
    assert decode_tokens(1, KNOWN) == 0
