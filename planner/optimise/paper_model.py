"""Time and cost exactly as the paper prints them: equations (1) to (9) of A.3 and A.4.

One invocation per activated remote expert in decode, experts of a replica one after another,
transfers never overlapped with computing. `as_built` has what Remoe's functions really do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.optimise.replicas import lpt
from planner.optimise.system import System

__all__ = ["Configuration", "Estimate", "Routes", "evaluate_as_printed"]


@dataclass(frozen=True, slots=True)
class Routes:
    """Which experts the tokens of one request use; expectations work as well as facts.

    `prefill` is N^pre, [layers, experts]. `decode` is [steps, layers, experts], s of each decoded
    token; a row stands for `decode_tokens` / steps tokens, so that one row of expected routes is
    enough to plan with.
    """

    prompt_tokens: float
    decode_tokens: float
    prefill: NDArray[np.float64]
    decode: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Configuration:
    """The decision variables of (10): x, y, z and w; specs by their index."""

    remote: NDArray[np.bool_]  # [layers, experts]
    memory: NDArray[np.intp]  # [layers]
    replicas: NDArray[np.intp]  # [layers]
    main: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Times and the bill of one request, warm; `ttft_s` has the cold start of the system."""

    prefill_s: float
    decode_s: float
    ttft_s: float
    tpot_s: float
    main_usd: float
    remote_prefill_usd: float
    remote_decode_usd: float
    largest_payload_bytes: float

    @property
    def remote_usd(self) -> float:
        return self.remote_prefill_usd + self.remote_decode_usd

    @property
    def cost_usd(self) -> float:
        """The objective of (10): C^loc + C^rem."""
        return self.main_usd + self.remote_usd


def evaluate_as_printed(system: System, choice: Configuration, routes: Routes) -> Estimate:
    """Equations (1) to (9) for one configuration; the expert sums are over all layers."""
    main_vcpus = float(system.main.vcpus[choice.main])
    n_in, n_out = routes.prompt_tokens, routes.decode_tokens
    calls_s = 2 * system.token_bytes / system.bandwidth_bytes_per_s
    prefill_s = system.non_expert_prefill_s(n_in)
    decode_s = n_out * system.non_expert_step_s
    prefill_usd = decode_usd = payload = 0.0
    one_local = float(system.expert_times.seconds(np.ones(1), main_vcpus)[0])
    per_row = n_out / max(1, len(routes.decode))
    for layer in range(system.layers):
        remote = choice.remote[layer]
        spec = int(choice.memory[layer])
        usd_per_s = float(system.remote.usd_per_s[spec])
        vcpus = float(system.remote.vcpus[spec])
        rows = routes.prefill[layer]
        local_s = float(system.expert_times.seconds(rows[~remote], main_vcpus).sum())
        replicas_s = 0.0  # (3)
        if remote.any():
            load_s = system.expert_times.seconds(rows[remote], vcpus) + rows[remote] * calls_s
            z = int(choice.replicas[layer])
            owner = lpt(load_s[None], z)[0]
            each = np.bincount(owner, load_s, z) + system.invocation_s
            replicas_s = float(each.max())
            prefill_usd += usd_per_s * float(each.sum())  # (8)
            copies = float(np.bincount(owner, rows[remote], z).max())
            payload = max(payload, copies * system.token_bytes)  # (10g)
        prefill_s += max(local_s, replicas_s) + 2 * system.move_s(n_in)  # (2)
        one_remote = float(system.expert_times.seconds(np.ones(1), vcpus)[0])
        used = routes.decode[:, layer]  # [steps, experts]
        hit_s = used[:, remote].sum(axis=1) * (one_remote + calls_s + system.invocation_s)
        local_hit_s = used[:, ~remote].sum(axis=1) * one_local
        moves_s = 2 * system.move_s(system.top_k)
        decode_s += per_row * float((np.maximum(local_hit_s, hit_s) + moves_s).sum())  # (4), (5)
        decode_usd += usd_per_s * per_row * float(hit_s.sum())  # (9)
    prefill_s *= system.prefill_factor
    decode_s *= system.decode_factor
    main_usd = (prefill_s + decode_s) * system.main_usd_per_s(choice.main, n_in + n_out)  # (6)
    return Estimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        ttft_s=prefill_s + system.cold_start_s,
        tpot_s=decode_s / n_out if n_out else 0.0,
        main_usd=main_usd,
        remote_prefill_usd=prefill_usd,
        remote_decode_usd=decode_usd,
        largest_payload_bytes=payload,
    )
