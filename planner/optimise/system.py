"""What the optimisation knows of model, machine and prices: the constants of A.2.

Bytes, GB (1e9 bytes), seconds and USD throughout; any consistent currency will do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from planner.optimise.expert_times import ExpertTimes
from planner.optimise.specs import SpecTable

__all__ = ["Granularity", "System"]

Granularity = Literal["expert", "layer", "block"]

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One model on one platform.

    `moe_layers` are the layers with experts; arrays by layer elsewhere have a row for each of
    them, dense layers left out. `non_expert_rows`/`non_expert_s` are τ^f of all layers together,
    interpolated linearly and continued beyond the last; `non_expert_step_s` is Σ t^f.
    `main_fixed_gb` is what the main function holds on the CPU besides local experts,
    `gpu_fixed_gb` M^g without the key-value cache, which `kv_on_gpu` says where to put.
    `rows_of_a_pass` is how many tokens of a prompt the main function reads at once.
    `billed_overhead`: whether a call's transfer and invocation are billed, as (8) and (9) have it,
    or its computing time only, as Remoe's busy ledger does. `blocks` lists, for functions that
    hold several layers, the row where each begins.
    """

    experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    token_bytes: float  # D
    bandwidth_bytes_per_s: float  # B
    invocation_s: float  # t^rem
    non_expert_rows: tuple[float, ...]
    non_expert_s: tuple[float, ...]
    non_expert_step_s: float
    move_s_per_token: float  # τ^sw
    expert_times: ExpertTimes  # τ^c
    remote: SpecTable  # M, of remote functions
    main: SpecTable
    expert_gb: float  # μ(e), as resident
    expert_runtime_gb: float
    remote_expansion: float = 1.0  # resident bytes of a remote expert per stored byte
    main_fixed_gb: float
    gpu_fixed_gb: float
    kv_gb_per_token: float
    kv_on_gpu: bool
    gpu_usd_per_gb_s: float  # c^g
    payload_bytes: float = 6e6  # U, Lambda's
    rows_of_a_pass: float = float("inf")
    max_replicas: int = 4  # z^max
    cold_start_s: float = 0.0  # T^cold
    main_least_gb: float = 0.0  # M^cal of A.9
    prefill_factor: float = 1.0
    decode_factor: float = 1.0
    billed_overhead: bool = True
    granularity: Granularity = "layer"
    blocks: tuple[int, ...] | None = None

    @property
    def layers(self) -> int:
        return len(self.moe_layers)

    @property
    def group_starts(self) -> NDArray[np.intp]:
        """First row of each function's layers; each layer its own function by default."""
        if self.granularity == "block" and self.blocks is not None:
            return np.array(self.blocks, np.intp)
        return np.arange(self.layers)

    @property
    def remote_expert_gb(self) -> float:
        """μ(e) where it is remote."""
        return self.expert_gb * self.remote_expansion

    @property
    def rows_per_call(self) -> float:
        """What one call carries at most."""
        return min(self.rows_of_a_pass, max(1.0, self.payload_bytes // self.token_bytes))

    def non_expert_prefill_s(self, tokens: float) -> float:
        """Σ_l τ^f_l(tokens)."""
        rows, seconds = np.array(self.non_expert_rows), np.array(self.non_expert_s)
        if len(rows) == 1:
            return float(seconds[0] * tokens / rows[0])
        if tokens > rows[-1]:
            slope = (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])
            return float(seconds[-1] + slope * (tokens - rows[-1]))
        return float(np.interp(tokens, rows, seconds))

    def move_s(self, tokens: float) -> float:
        """τ^sw, one way."""
        return self.move_s_per_token * tokens

    def main_need_gb(self, local_experts: float, tokens: float) -> float:
        """What the main function's CPU side must hold."""
        cache = 0.0 if self.kv_on_gpu else tokens * self.kv_gb_per_token
        return self.main_fixed_gb + cache + local_experts * self.expert_gb

    def gpu_gb(self, tokens: float) -> float:
        """M^g of (7)."""
        return self.gpu_fixed_gb + (tokens * self.kv_gb_per_token if self.kv_on_gpu else 0.0)

    def main_usd_per_s(self, spec: int, tokens: float) -> float:
        """H^w: the main function's price of a second."""
        return float(self.main.usd_per_s[spec]) + self.gpu_usd_per_gb_s * self.gpu_gb(tokens)

    def with_(self, **changes: object) -> Self:
        """A copy with some constants changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
