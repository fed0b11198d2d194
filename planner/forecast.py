"""What a request will take: calls to each expert function, times, and cost.

As built, not as printed: one call per function and layer carries every routed row (papers.md D 9),
so a decode step calls a layer's function with the chance that `remote_call_chance` gives, and a
prefill of many tokens nearly always. Times are those measured here, warm; a cold start is not in
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.measurements import Measurements
from planner.phases import PhaseProfiles
from planner.remote_calls import remote_call_chance
from planner.selection import remote_mask
from remoe.experts import Partition
from remoe.ledger import Ledger
from remoe.plan import Slo
from remoe.prices import PriceBook
from remoe.topology import ExpertEndpoint

__all__ = [
    "USUAL_DECODE_TOKENS",
    "Forecast",
    "FunctionLoad",
    "Workload",
    "decode_tokens",
    "forecast",
    "function_loads",
]

USUAL_DECODE_TOKENS = 128
"""N^out before any request has shown it: clients' limits are far above what most answers take."""


@dataclass(frozen=True, slots=True)
class Workload:
    """N^in, and N^out: tokens after the first, which prefill gives."""

    prompt_tokens: int
    decode_tokens: float


@dataclass(frozen=True, slots=True)
class FunctionLoad:
    """Expected token-expert assignments sent to one function, and expected calls of it."""

    function: ExpertEndpoint
    routes: float
    calls: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """None where nothing has been measured yet. `feasible` is false if a known time breaks the SLO."""

    ttft_s: float | None
    tpot_s: float | None
    cost_usd: float | None
    feasible: bool


def decode_tokens(max_new_tokens: int | None, measured: Measurements) -> float:
    """Expected tokens after the first: the observed mean, or `USUAL_DECODE_TOKENS` before there is
    one, if the limit does not end it sooner."""
    mean = measured.decode_tokens
    usual = float(USUAL_DECODE_TOKENS) if mean is None else mean
    return usual if max_new_tokens is None else min(float(max_new_tokens - 1), usual)


def function_loads(
    profiles: PhaseProfiles,
    partition: Partition,
    functions: Sequence[ExpertEndpoint],
    workload: Workload,
    top_k: int,
) -> list[FunctionLoad]:
    """Spread the request's expected remote work over the functions that hold its layers."""
    mask = remote_mask(partition)
    expected = profiles.expected_routes(workload.prompt_tokens, workload.decode_tokens, top_k)
    routes = (expected * mask).sum(axis=1)  # [layers]
    in_one = remote_call_chance(profiles.prefill.shares, mask, top_k)
    in_prefill = 1 - (1 - in_one) ** workload.prompt_tokens
    in_decode = workload.decode_tokens * remote_call_chance(profiles.decode.shares, mask, top_k)
    calls = in_prefill + in_decode  # [layers]
    loads = []
    for function in functions:
        layers = slice(function.first_layer, function.last_layer + 1)
        loads.append(
            FunctionLoad(function, float(routes[layers].sum()), float(calls[layers].sum()))
        )
    return loads


def forecast(
    workload: Workload,
    loads: Sequence[FunctionLoad],
    *,
    main_memory_gb: float,
    measured: Measurements,
    prices: PriceBook,
    slo: Slo | None,
) -> Forecast:
    """Forecast one request from its loads; `main_memory_gb` is what the main function bills."""
    ttft_s = measured.prefill_s(workload.prompt_tokens)
    tpot_s = measured.decode_s_per_token
    late = slo is not None and (
        (ttft_s is not None and ttft_s > slo.ttft_s) or (tpot_s is not None and tpot_s > slo.tpot_s)
    )
    return Forecast(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        cost_usd=_cost_usd(workload, loads, main_memory_gb, measured, prices),
        feasible=not late,
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _cost_usd(
    workload: Workload,
    loads: Sequence[FunctionLoad],
    main_memory_gb: float,
    measured: Measurements,
    prices: PriceBook,
) -> float | None:
    """Price the ledger the request is expected to run up; None while a part of it is unknown."""
    prefill_s = measured.prefill_s(workload.prompt_tokens)
    decode_s = _scaled(measured.decode_s_per_token, workload.decode_tokens)
    if workload.decode_tokens == 0:
        decode_s = 0.0
    # The functions' deployed memory is what they bill, whatever this plan would give them.
    call_gb = sum(load.calls * load.function.memory_gb for load in loads)
    remote_gb_s = _scaled(measured.remote_s_per_call, call_gb)
    if call_gb == 0:
        remote_gb_s = 0.0
    cpu, gpu = measured.main_cpu_share, measured.main_gpu_share
    if prefill_s is None or decode_s is None or remote_gb_s is None or cpu is None or gpu is None:
        return None
    if gpu and prices.gpu_usd_per_gb_s is None:
        return None
    main_gb_s = main_memory_gb * (prefill_s + decode_s)
    ledger = Ledger(
        main_cpu_gb_s=main_gb_s * cpu, main_gpu_gb_s=main_gb_s * gpu, remote_gb_s=remote_gb_s
    )
    return ledger.cost(prices).total_usd
