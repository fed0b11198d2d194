"""What the paper compares with: MIX, CPU, GPU and Fetch (A.13), at the same prices.

The paper gives their ideas, not their formulas; these are the readings of A.13. Times of a model
that runs whole on one device come from the same profile: experts at the main function's vCPUs on
the CPU, at `gpu_speedup` times that on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.optimise.as_built import Demand
from planner.optimise.system import System

__all__ = ["Baseline", "baselines"]


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to serve the request without remote experts; `assumes` is what nobody measured."""

    name: str
    ttft_s: float
    tpot_s: float
    cost_usd: float
    assumes: str | None = None


def baselines(
    system: System,
    demand: Demand,
    *,
    gpu_speedup: float,
    gpu_prefill_speedup: float | None = None,
    cpu_dense_s: tuple[float, float] | None = None,
) -> list[Baseline]:
    """MIX, CPU, GPU and Fetch for one request, warm.

    `gpu_speedup` is how much faster the GPU computes an expert than the main function's CPU does,
    `gpu_prefill_speedup` the same for a prompt's rows if that is another; where the dense part was
    measured on a CPU it speeds that up too. `cpu_dense_s` is the dense part's time for the prompt
    and for a token on the CPU, if it was measured on a GPU; else CPU has MIX's.
    """
    experts_gb = system.layers * system.experts * system.expert_gb
    kv_gb = demand.tokens * system.kv_gb_per_token
    need_gb = system.main_need_gb(system.layers * system.experts, demand.tokens)
    main = system.main.smallest(min(need_gb, float(system.main.memory_gb[-1])))
    vcpus = float(system.main.vcpus[main])
    cpu_usd = float(system.main.usd_per_s[main])
    expert_prefill_s, expert_step_s = _expert_times(system, demand, vcpus)
    moves = (2 * system.move_s(demand.prompt_tokens), 2 * system.move_s(system.top_k))
    dense = (
        system.prefill_factor * system.non_expert_prefill_s(demand.prompt_tokens),
        system.decode_factor * system.non_expert_step_s,
    )
    on_cpu = (
        dense[0] + system.prefill_factor * (expert_prefill_s + system.layers * moves[0]),
        dense[1] + system.decode_factor * (expert_step_s + system.layers * moves[1]),
    )
    slower = cpu_dense_s or dense
    cpu_only = (on_cpu[0] - dense[0] + slower[0], on_cpu[1] - dense[1] + slower[1])
    faster = 1.0 if system.kv_on_gpu else gpu_speedup
    reading = gpu_prefill_speedup or gpu_speedup
    on_gpu = (
        dense[0] / faster + system.prefill_factor * expert_prefill_s / reading,
        dense[1] / faster + system.decode_factor * expert_step_s / gpu_speedup,
    )
    dense_gb = system.gpu_fixed_gb if system.kv_on_gpu else system.main_fixed_gb
    gpu_usd = system.gpu_usd_per_gb_s
    experts_usd_per_s = cpu_usd * min(1.0, experts_gb / need_gb)
    fetched_gb = system.top_k * system.layers * system.expert_gb
    whole_gb = dense_gb + kv_gb + experts_gb
    # All on the CPU: what the GPU held comes to the CPU's memory, at its price for a GB.
    cpu_only_usd = cpu_usd * whole_gb / need_gb if system.kv_on_gpu else cpu_usd
    mix_usd = cpu_usd + gpu_usd * system.gpu_gb(demand.tokens)
    fetch_usd = gpu_usd * (dense_gb + kv_gb + fetched_gb) + experts_usd_per_s

    def priced(name: str, times: tuple[float, float], usd_per_s: float) -> Baseline:
        total_s = times[0] + demand.decode_tokens * times[1]
        assumes = f"a GPU {gpu_speedup:g} times as fast as this CPU" if times is on_gpu else None
        return Baseline(name, times[0], times[1], total_s * usd_per_s, assumes)

    return [
        priced("MIX", on_cpu, mix_usd),
        priced("CPU", cpu_only, cpu_only_usd),
        priced("GPU", on_gpu, gpu_usd * whole_gb),
        priced("Fetch", on_gpu, fetch_usd),
    ]


def _expert_times(system: System, demand: Demand, vcpus: float) -> tuple[float, float]:
    """All experts of a prompt, and of one decoded token, one after another on one device."""
    rows = demand.prompt_tokens * system.top_k * demand.prefill
    prefill_s = float(system.expert_times.seconds(rows, vcpus).sum())
    one_s = float(system.expert_times.seconds(np.ones(1), vcpus)[0])
    return prefill_s, system.layers * system.top_k * one_s
