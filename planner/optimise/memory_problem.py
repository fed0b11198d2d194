"""The paper's memory problem P1 (12): specs of the remote functions for a given partition (A.11).

min (1 + η) Σ_l Σ_v y_lv (s̃_l T_v + calls_l t^rem)(H^w + c_v), with T_v = topk t^c_v, subject to
TPOT, capacity (10e) and one spec for each layer. As printed t^rem counts once for each layer and
token; `calls` counts it by what really happens (papers.md A.11, D 9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.optimise.system import System

__all__ = ["MemoryProblem", "memory_problem"]

ETA = 0.1
"""Prefill takes at most this share of decode (A.11)."""


@dataclass(frozen=True, slots=True)
class MemoryProblem:
    """In the form of `knapsack.choose`: cost [layers, specs], use [1, layers, specs], budget [1]."""

    cost: NDArray[np.float64]
    use: NDArray[np.float64]
    budget: NDArray[np.float64]


def memory_problem(
    system: System,
    decode_shares: NDArray[np.float64],
    remote: NDArray[np.bool_],
    *,
    main: int,
    tokens: float,
    tpot_s: float,
    prefill_rows: NDArray[np.float64] | None = None,
    calls: Literal["per-layer", "per-hit", "expected"] = "per-layer",
) -> MemoryProblem:
    """Tabulate P1 on the grid of specs, in USD for each decoded token.

    `decode_shares` and `remote` are [layers, experts]. `prefill_rows`, N^pre, adds the tokens a
    function holds to its capacity. A layer without remote experts costs nothing at any spec.
    """
    share = np.where(remote, decode_shares, 0).sum(axis=1)  # s̃, [layers]
    one_s = system.expert_times.basis(np.ones(1))[0] @ system.expert_times.at(system.remote.vcpus)
    expected = {
        "per-layer": (share > 0).astype(np.float64),
        "per-hit": system.top_k * share,
        "expected": 1 - (1 - share.clip(0, 1)) ** system.top_k,
    }[calls]
    seconds = system.top_k * share[:, None] * one_s + expected[:, None] * system.invocation_s
    usd_per_s = system.main_usd_per_s(main, tokens) + system.remote.usd_per_s
    used = remote.any(axis=1, keepdims=True)
    held_gb = remote.sum(axis=1) * system.remote_expert_gb + system.expert_runtime_gb
    if prefill_rows is not None:
        held_gb = held_gb + np.where(remote, prefill_rows, 0).sum(axis=1) * system.token_bytes / 1e9
    fits = (system.remote.memory_gb + 1e-12 >= held_gb[:, None]) | ~used
    cost = np.where(fits, (1 + ETA) * seconds * usd_per_s, np.inf)
    trip_s = system.top_k * share.sum() * 2 * system.token_bytes / system.bandwidth_bytes_per_s
    rest_s = system.non_expert_step_s + system.layers * 2 * system.move_s(system.top_k) + trip_s
    return MemoryProblem(cost, seconds[None], np.array([tpot_s - rest_s]))
