"""From what was measured of a machine and a model to the constants of the optimisation.

See papers.md A.2, A.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.model import ModelFacts
from planner.optimise.expert_times import ExpertTimes
from planner.optimise.robustness import Uncertainty
from planner.optimise.specs import Platform, SpecTable, platform_specs
from planner.optimise.system import Granularity, System
from remoe.hardware import HardwareProfile, Spread
from remoe.prices import PriceBook
from remoe.topology import ExpertEndpoint

__all__ = ["SystemRules", "measured_system", "measured_uncertainty"]

_GB = 1e9
_MOST_GB = 64.0
# A row goes out in the model's 2-byte type and comes back as a float32 sum.
_BYTES_PER_NUMBER = 3.0
_FINEST_GB = 0.1
_MAIN_SPECS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemRules:
    """What a deployment decides rather than measures.

    `platform` "deployed" knows no specs but those the functions run with, with `function_vcpus`
    each; their memory then also limits what can be remote.
    """

    platform: Platform | Literal["deployed"]
    function_vcpus: float
    granularity: Granularity
    payload_bytes: float
    rows_of_a_pass: float
    max_replicas: int
    main_runtime_gb: float
    expert_runtime_gb: float
    expert_expansion: float


def measured_system(
    profile: HardwareProfile,
    model: ModelFacts,
    functions: Sequence[ExpertEndpoint],
    prices: PriceBook,
    rules: SystemRules,
) -> System:
    """Build the as-built system: with a GPU the dense part and the cache are in its memory, and
    local experts are the CPU's (A.2).

    The main function has the cores it was measured with whatever its memory; remote functions
    have what their platform gives them. ValueError if the GPU it uses has no price.
    """
    expert_gb = model.expert_size_bytes / _GB
    blocks = _blocks(model, functions)
    largest = max(np.diff([*blocks, len(model.moe_layers)]), default=1)
    held_gb = largest * model.experts * expert_gb * rules.expert_expansion
    if rules.granularity == "expert":
        held_gb = expert_gb * rules.expert_expansion
    most_gb = min(_MOST_GB, max(2.0, held_gb + rules.expert_runtime_gb + 1.0))
    on_gpu, unit_usd = profile.main_on_gpu, prices.cpu_usd_per_gb_s
    if on_gpu and prices.gpu_usd_per_gb_s is None:
        raise ValueError(f"the price book {prices.name} has no price for the GPU that is used")
    dense_gb = model.non_expert_size_bytes / _GB
    fixed_gb = rules.main_runtime_gb + (0.0 if on_gpu else dense_gb)
    cache_gb = model.context_length * model.kv_bytes_per_token / _GB
    whole_gb = fixed_gb + cache_gb + model.expert_count * expert_gb
    step_gb = max(_FINEST_GB, math.ceil(10 * whole_gb / _MAIN_SPECS) / 10)
    main_gb = step_gb * np.arange(1, math.ceil(whole_gb / step_gb) + 2, dtype=np.float64)
    return System(
        experts=model.experts,
        top_k=model.top_k,
        moe_layers=model.moe_layers,
        token_bytes=_BYTES_PER_NUMBER * model.hidden_size,
        bandwidth_bytes_per_s=profile.bandwidth_bytes_per_s,
        invocation_s=profile.invocation.mean_s,
        non_expert_rows=tuple(float(rows) for rows in profile.non_expert_rows),
        non_expert_s=tuple(profile.non_expert_s),
        non_expert_step_s=profile.non_expert_step_s,
        move_s_per_token=profile.move_s_per_token,
        expert_times=ExpertTimes(
            np.array([float(one.rows) for one in profile.expert]),
            tuple(one.curve for one in profile.expert),
        ),
        remote=_remote_specs(functions, rules, most_gb, prices.cpu_usd_per_gb_s),
        main=SpecTable(main_gb, np.full(len(main_gb), profile.main_vcpus), unit_usd * main_gb),
        expert_gb=expert_gb,
        expert_runtime_gb=rules.expert_runtime_gb,
        remote_expansion=rules.expert_expansion,
        main_fixed_gb=fixed_gb,
        gpu_fixed_gb=dense_gb if on_gpu else 0.0,
        kv_gb_per_token=model.kv_bytes_per_token / _GB,
        kv_on_gpu=on_gpu,
        gpu_usd_per_gb_s=prices.gpu_usd_per_gb_s or 0.0,
        payload_bytes=rules.payload_bytes,
        rows_of_a_pass=rules.rows_of_a_pass,
        max_replicas=rules.max_replicas,
        cold_start_s=profile.main_cold_start.total.mean_s,
        billed_overhead=False,
        granularity=rules.granularity,
        blocks=blocks,
    )


def _remote_specs(
    functions: Sequence[ExpertEndpoint], rules: SystemRules, most_gb: float, usd_per_gb_s: float
) -> SpecTable:
    if rules.platform != "deployed":
        return platform_specs(rules.platform, most_gb=most_gb, usd_per_gb_s=usd_per_gb_s)
    # A plan may use no more than the smallest function has: its layers have as many experts.
    memory = np.array([min((function.memory_gb for function in functions), default=1.0)])
    return SpecTable(memory, np.array([rules.function_vcpus]), memory * usd_per_gb_s)


def measured_uncertainty(
    profile: HardwareProfile,
    *,
    asleep: bool,
    prefill_tail: float,
    decode_tail: float,
) -> Uncertainty:
    """The spreads of the profile; a cold start only if the main function is not running.

    Expert functions start beside it (A.6) and are up long before it is.
    """
    cold = profile.main_cold_start.total if asleep else Spread.fixed(0.0)
    return Uncertainty(profile.invocation, cold, prefill_tail, decode_tail)


def _blocks(model: ModelFacts, functions: Sequence[ExpertEndpoint]) -> tuple[int, ...]:
    """Where each deployed function begins among the layers with experts."""
    starts = []
    for function in functions:
        inside = [
            row
            for row, layer in enumerate(model.moe_layers)
            if function.first_layer <= layer <= function.last_layer
        ]
        if inside:
            starts.append(inside[0])
    return tuple(sorted(starts)) or tuple(range(len(model.moe_layers)))
