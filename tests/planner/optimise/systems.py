"""Random small systems and demands to optimise."""

from __future__ import annotations

import numpy as np

from planner.optimise.as_built import Demand
from planner.optimise.expert_times import ExpertTimes
from planner.optimise.specs import SpecTable, platform_specs, proportional
from planner.optimise.system import System
from remoe.hardware import AllocationCurve


def random_system(
    rng: np.random.Generator,
    *,
    layers: int = 2,
    experts: int = 4,
    top_k: int = 2,
    specs: SpecTable | None = None,
    **changes: object,
) -> System:
    """Magnitudes of small models on CPUs, with a GPU for the dense part half of the time."""
    one_row = float(rng.uniform(2e-4, 2e-3))
    # Weights are read once for a batch: 64 rows take far less than 64 times as long.
    knots = np.array([1.0, 8.0, 64.0])
    curves = tuple(
        AllocationCurve(
            vcpus=[0.25, 0.5, 1.0, 2.0],
            measured_s=[one_row * factor * slow for slow in (4.4, 2.1, 1.0, 0.62)],
        )
        for factor in (1.0, 2.2, 11.0)
    )
    on_gpu = bool(rng.integers(2))
    expert_gb = float(rng.uniform(0.01, 0.08))
    system = System(
        experts=experts,
        top_k=top_k,
        moe_layers=tuple(range(layers)),
        token_bytes=4096.0,
        bandwidth_bytes_per_s=float(rng.uniform(1e8, 1e9)),
        invocation_s=float(rng.uniform(1e-4, 1.5e-3)),
        non_expert_rows=(1.0, 64.0, 512.0),
        non_expert_s=(0.001 * layers, 0.004 * layers, 0.02 * layers),
        non_expert_step_s=0.001 * layers,
        move_s_per_token=1e-6 if on_gpu else 0.0,
        expert_times=ExpertTimes(knots, curves),
        remote=specs or proportional(np.linspace(0.2, 2.0, 5)),
        main=proportional(np.arange(0.2, 40, 0.1)),
        expert_gb=expert_gb,
        expert_runtime_gb=0.05,
        main_fixed_gb=float(rng.uniform(0.2, 1.0)),
        gpu_fixed_gb=float(rng.uniform(0.1, 1.0)) if on_gpu else 0.0,
        kv_gb_per_token=1e-5,
        kv_on_gpu=on_gpu,
        gpu_usd_per_gb_s=6.9e-5,
        payload_bytes=1e5,
        max_replicas=3,
    )
    return system.with_(**changes)


def random_demand(rng: np.random.Generator, system: System) -> Demand:
    shape = (system.layers, system.experts)
    skew = float(rng.uniform(0.1, 1.5))
    return Demand(
        prefill=rng.dirichlet(np.full(shape[1], skew), shape[0]),
        decode=rng.dirichlet(np.full(shape[1], skew), shape[0]),
        prompt_tokens=float(rng.integers(16, 600)),
        decode_tokens=float(rng.integers(8, 300)),
    )


__all__ = ["platform_specs", "random_demand", "random_system"]
