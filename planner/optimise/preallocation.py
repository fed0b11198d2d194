"""MMP: the main function's memory and the remote ratio b, before any prediction (Algorithm 2, A.9).

It runs while the prompt is still being tokenised and searched for, so it assumes the worst case of
Corollary 1 for what cold experts get. Read as in A.9: local experts are counted once, the b that
passed the test is kept, b = 0 ends the search, and remote functions are given the largest spec,
since specs are chosen later and only under the same SLOs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.optimise.bounds import worst_load
from planner.optimise.pricing import Limits
from planner.optimise.system import System

__all__ = ["Preallocation", "WorstCase", "preallocate", "worst_case"]


@dataclass(frozen=True, slots=True)
class WorstCase:
    """What a ratio takes at worst: times, and the main function's memory."""

    ttft_s: float
    tpot_s: float
    main_gb: float


@dataclass(frozen=True, slots=True)
class Preallocation:
    """w as an index into the main specs, and b; not feasible means that b is 0 and still late."""

    main: int
    remote_count: int
    ratio: float
    worst: WorstCase
    feasible: bool


def worst_case(
    system: System,
    ratio: float,
    *,
    prompt_tokens: float,
    decode_tokens: float,
    one_call: bool = False,
    printed_bound: bool = False,
) -> WorstCase:
    """Estimate a ratio with Corollary 1 (A.9). The remote path is taken as the bottleneck.

    As printed every remote hit of a token is an invocation; `one_call` pays one for a layer.
    """
    rows = prompt_tokens * system.top_k
    load = worst_load(rows, ratio, printed=printed_bound)
    replicas = max(1, math.ceil(load * system.token_bytes / system.payload_bytes))
    vcpus = float(system.remote.vcpus[-1])
    trip_s = 2 * system.token_bytes / system.bandwidth_bytes_per_s
    main_gb = max(
        system.main_need_gb(
            system.layers * (system.experts - math.floor(ratio * system.experts + 1e-9)),
            prompt_tokens + decode_tokens,
        ),
        system.main_least_gb,
    )
    if main_gb > system.main.memory_gb[-1]:
        return WorstCase(math.inf, math.inf, main_gb)
    local_vcpus = float(system.main.vcpus[system.main.smallest(main_gb)])
    one_local_s = float(system.expert_times.seconds(np.ones(1), local_vcpus)[0])
    local_s = float(system.expert_times.seconds(np.array([rows - load]), local_vcpus)[0])
    layer_s = 2 * system.move_s(prompt_tokens)
    if load > 0:
        each = load / replicas
        remote_s = float(system.expert_times.seconds(np.array([each]), vcpus)[0])
        layer_s += max(local_s, remote_s + each * trip_s + system.invocation_s)
    else:
        layer_s += local_s
    prefill_s = system.non_expert_prefill_s(prompt_tokens) + system.layers * layer_s
    step_s = system.non_expert_step_s + system.layers * 2 * system.move_s(system.top_k)
    if decode_tokens > 0:
        hits = worst_load(decode_tokens * system.top_k, ratio, printed=printed_bound)
        hits /= decode_tokens  # remote hits of a token and layer
        one_s = float(system.expert_times.seconds(np.ones(1), vcpus)[0])
        calls = min(1.0, hits) if one_call else hits
        remote_s = hits * (one_s + trip_s) + calls * system.invocation_s
        step_s += system.layers * max((system.top_k - hits) * one_local_s, remote_s)
    return WorstCase(
        ttft_s=system.prefill_factor * prefill_s + system.cold_start_s,
        tpot_s=system.decode_factor * step_s,
        main_gb=main_gb,
    )


def preallocate(
    system: System,
    limits: Limits,
    *,
    prompt_tokens: float,
    decode_tokens: float,
    one_call: bool = False,
    printed_bound: bool = False,
) -> Preallocation:
    """Lower b expert by expert from 1 until both SLOs hold in the worst case.

    If none holds, b = 0 with the largest spec at most: serve all experts locally (the papers' MIX).
    """

    def look(count: int) -> WorstCase:
        return worst_case(
            system,
            count / system.experts,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            one_call=one_call,
            printed_bound=printed_bound,
        )

    for count in range(system.experts, -1, -1):
        worst = look(count)
        if worst.ttft_s <= limits.ttft_s and worst.tpot_s <= limits.tpot_s:
            main = system.main.smallest(worst.main_gb)
            return Preallocation(main, count, count / system.experts, worst, True)
    worst = look(0)
    fits = worst.main_gb <= system.main.memory_gb[-1]
    main = system.main.smallest(worst.main_gb) if fits else len(system.main) - 1
    return Preallocation(main, 0, 0.0, worst, False)
