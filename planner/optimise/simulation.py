"""One plan, many requests: routes are drawn, calls and cold starts vary, SLOs hold or break.

The paper leaves open how its plans fare when cold starts and the network jitter. This samples what
the planner only has expectations of: every token's distinct experts, every call's time, and a
request's own luck with its network and its cold start.

See papers.md A.3, A.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.optimise.as_built import Demand
from planner.optimise.replicas import lpt
from planner.optimise.system import System
from planner.optimise.whole_plan import WholePlan

__all__ = ["Jitter", "Outcome", "simulate"]


@dataclass(frozen=True, slots=True)
class Jitter:
    """A factor with a heavy tail: Pareto from `least` with exponent `tail`, cut at `most`.

    The default has mean 0.95, median 0.71, P95 2.2 and P99 5.
    """

    least: float = 0.5
    most: float = 5.0
    tail: float = 2.0

    def sample(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> NDArray[np.float64]:
        drawn = self.least * (1 - rng.random(size)) ** (-1 / self.tail)
        return np.minimum(drawn, self.most)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times of every simulated request, [requests]."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]

    def attained(self, ttft_s: float, tpot_s: float) -> float:
        """The share of requests within both."""
        return float(((self.ttft_s <= ttft_s) & (self.tpot_s <= tpot_s)).mean())


def simulate(
    system: System,
    demand: Demand,
    plan: WholePlan,
    *,
    rng: np.random.Generator,
    requests: int,
    call_jitter: Jitter,
    request_jitter: Jitter,
    cold_jitter: Jitter,
    route_noise: float = 0.0,
) -> Outcome:
    """Run the plan's request so many times on `system`, whose times are those without jitter.

    `route_noise` above 0 draws the true profile around the predicted one, from a Dirichlet
    distribution with concentration 1 / `route_noise`.
    """
    ttft, tpot = np.empty(requests), np.empty(requests)
    prompt, steps = int(demand.prompt_tokens), int(demand.decode_tokens)
    for index in range(requests):
        network = float(request_jitter.sample(rng, 1)[0])
        prefill = _drawn(rng, demand.prefill, route_noise)
        decode = _drawn(rng, demand.decode, route_noise)
        rows = _routes(rng, prefill, prompt, system.top_k)  # [prompt, layers, experts]
        prefill_s = system.non_expert_prefill_s(prompt)
        prefill_s += _prefill_s(system, plan, rows, rng=rng, jitter=call_jitter, network=network)
        hits = _routes(rng, decode, steps, system.top_k)
        step_s = _steps_s(system, plan, hits, rng=rng, jitter=call_jitter, network=network)
        cold_s = system.cold_start_s * float(cold_jitter.sample(rng, 1)[0])
        ttft[index] = cold_s + system.prefill_factor * prefill_s
        tpot[index] = system.decode_factor * (system.non_expert_step_s + float(step_s.mean()))
    return Outcome(ttft, tpot)


def _drawn(
    rng: np.random.Generator, profile: NDArray[np.float64], noise: float
) -> NDArray[np.float64]:
    if noise <= 0:
        return profile
    drawn = rng.standard_gamma(profile / noise + 1e-9)
    result: NDArray[np.float64] = drawn / drawn.sum(axis=1, keepdims=True)
    return result


def _routes(
    rng: np.random.Generator, profile: NDArray[np.float64], tokens: int, top_k: int
) -> NDArray[np.bool_]:
    """Each token's distinct experts, drawn one after another: [tokens, layers, experts]."""
    keys = np.log(np.maximum(profile, 1e-12)) + rng.gumbel(size=(tokens, *profile.shape))
    chosen = np.argpartition(-keys, top_k - 1, axis=2)[..., :top_k]
    result = np.zeros(keys.shape, np.bool_)
    np.put_along_axis(result, chosen, True, axis=2)
    return result


def _prefill_s(
    system: System,
    plan: WholePlan,
    routes: NDArray[np.bool_],
    *,
    rng: np.random.Generator,
    jitter: Jitter,
    network: float,
) -> float:
    total = 0.0
    rows = routes.sum(axis=0).astype(np.float64)  # [layers, experts]
    main_vcpus = float(system.main.vcpus[plan.main])
    trip_s = 2 * system.token_bytes / system.bandwidth_bytes_per_s
    for layer in range(system.layers):
        remote = plan.remote[layer]
        local_s = float(system.expert_times.seconds(rows[layer, ~remote], main_vcpus).sum())
        slowest = 0.0
        if remote.any():
            vcpus = float(system.remote.vcpus[plan.specs[layer]])
            z = int(plan.replicas[layer])
            mine = np.where(remote, rows[layer], 0)
            owner = np.where(remote, lpt(mine[None], z)[0], -1)
            for replica in range(z):
                experts = owner == replica
                tokens = int(routes[:, layer, experts].any(axis=1).sum())
                if tokens == 0:
                    continue
                calls = int(np.ceil(tokens / system.rows_per_call))
                overhead = system.invocation_s * jitter.sample(rng, calls).sum()
                computing = system.expert_times.seconds(rows[layer, experts], vcpus).sum()
                replica_s = network * (overhead + tokens * trip_s) + computing
                slowest = max(slowest, float(replica_s))
        total += max(local_s, slowest) + 2 * system.move_s(len(routes))
    return total


def _steps_s(
    system: System,
    plan: WholePlan,
    routes: NDArray[np.bool_],
    *,
    rng: np.random.Generator,
    jitter: Jitter,
    network: float,
) -> NDArray[np.float64]:
    """The experts' part of every decoded token, [steps]."""
    vcpus = system.remote.vcpus[plan.specs]  # [layers]
    one = system.expert_times.basis(np.ones(1))[0]
    one_remote_s = one @ system.expert_times.at(vcpus)  # [layers]
    main_vcpus = float(system.main.vcpus[plan.main])
    one_local_s = float(system.expert_times.seconds(np.ones(1), main_vcpus)[0])
    hits = (routes & plan.remote).sum(axis=2)  # [steps, layers]
    trip_s = 2 * system.token_bytes / system.bandwidth_bytes_per_s
    overhead = network * (system.invocation_s * jitter.sample(rng, hits.shape) + trip_s)
    remote_s = np.where(hits > 0, overhead + hits * one_remote_s, 0)
    local_s = (system.top_k - hits) * one_local_s
    layer_s = np.maximum(local_s, remote_s) + 2 * system.move_s(1)
    result: NDArray[np.float64] = layer_s.sum(axis=1)
    return result
