"""What a request of a published model's shape costs each way, by the cost model that plans (A.3, A.4).

Routes are drawn with the skew that the default model was measured to have; plans are made from a
prediction that is as far off as predictions are, and priced with what was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from evaluation.hosts import Host
from evaluation.shapes import Shape
from planner.divergence import js_divergence
from planner.optimise.as_built import Demand
from planner.optimise.cost_baselines import baselines
from planner.optimise.system import System
from planner.optimise.whole_plan import Limits, WholePlan, WholePlanner

__all__ = ["Case", "Outcome", "Skew", "Way", "concentration_of", "cost_of_requests"]

WAYS = ("Remoe", "MIX", "CPU", "GPU", "Fetch")


@dataclass(frozen=True, slots=True)
class Skew:
    """`concentration` of the Dirichlet distribution that an expert's share is drawn from: the
    smaller, the more uneven. `heed` is how much of a request's own shares a prediction knows; the
    rest is taken to be uniform."""

    concentration: float
    heed: float


def concentration_of(shares: NDArray[np.floating]) -> float:
    """Per expert, of the symmetric Dirichlet whose shares vary as much; [..., experts].

    With K experts a share's variance is (1/K)(1 - 1/K) / (K a + 1).
    """
    experts = shares.shape[-1]
    variance = float(((shares - 1 / experts) ** 2).mean())
    found = ((1 / experts) * (1 - 1 / experts) / variance - 1) / experts
    return float(max(1e-3, found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One point of a sweep. `slo` times MIX's warm TTFT and TPOT are the limits (inf: none)."""

    prompt_tokens: float = 125.0  # 500 characters
    decode_tokens: float = 200.0
    cpu_usd_per_gb_s: float = 2.3e-5
    gpu_price_ratio: float = 3.0
    slo: float = 1.2
    invocation_s: float | None = None
    billed_overhead: bool = True


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve a request. `resident_usd` prices all memory that is held while it runs."""

    ttft_s: float
    tpot_s: float
    usd: float
    resident_usd: float
    meets_slo: bool


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One request every way; `remote_share` is of all experts, `prediction_js` in nats."""

    ways: dict[str, Way]
    feasible: bool
    remote_share: float
    prediction_js: float

    @property
    def best_baseline(self) -> str:
        """The cheapest of those that meet the SLO; MIX always does."""
        fit = [name for name, way in self.ways.items() if name != "Remoe" and way.meets_slo]
        return min(fit, key=lambda name: self.ways[name].usd)

    @property
    def saving(self) -> float:
        """Of Remoe against that; negative where Remoe is dearer."""
        return 1 - self.ways["Remoe"].usd / self.ways[self.best_baseline].usd


def cost_of_requests(
    host: Host, shape: Shape, case: Case, skew: Skew, *, requests: int, seed: int = 0
) -> list[Outcome]:
    """The same requests for the same seed, whatever the case."""
    system = host.system(
        shape, cpu_usd_per_gb_s=case.cpu_usd_per_gb_s, gpu_price_ratio=case.gpu_price_ratio
    ).with_(billed_overhead=case.billed_overhead)
    if case.invocation_s is not None:
        system = system.with_(invocation_s=case.invocation_s)
    chance = np.random.default_rng(seed)
    alpha = np.full(shape.experts, skew.concentration)
    found = []
    for _ in range(requests):
        own, answer = chance.dirichlet(alpha, (2, shape.moe_layers))
        answer = (own + answer) / 2  # what is written differs from what is read, not wholly
        found.append(_outcome(host, shape, system, case, routes=(own, answer), heed=skew.heed))
    return found


def _outcome(
    host: Host,
    shape: Shape,
    system: System,
    case: Case,
    *,
    routes: tuple[NDArray[np.float64], NDArray[np.float64]],
    heed: float,
) -> Outcome:
    prefill, decode = routes

    def demand(weight: float) -> Demand:
        even = (1 - weight) / shape.experts
        return Demand(
            weight * prefill + even,
            weight * decode + even,
            case.prompt_tokens,
            case.decode_tokens,
        )

    truth, predicted = demand(1.0), demand(heed)
    ways = _baselines(host, shape, system, truth)
    mix = ways["MIX"]
    limits = Limits(case.slo * mix.ttft_s, case.slo * mix.tpot_s)
    plan = WholePlanner(system, predicted, limits=limits).plan("cost")
    # The partition as it was planned, and what it then costs by what was really routed.
    actual = WholePlanner(system, truth, limits=limits, remote=plan.remote).plan()
    estimate = actual.estimate
    meets = estimate.ttft_s <= limits.ttft_s * (1 + 1e-9) and estimate.tpot_s <= limits.tpot_s * (
        1 + 1e-9
    )
    ways = {
        name: msgspec.structs.replace(
            way, meets_slo=way.ttft_s <= limits.ttft_s and way.tpot_s <= limits.tpot_s
        )
        for name, way in ways.items()
    }
    took_s = estimate.prefill_s + estimate.decode_s
    ways["Remoe"] = Way(
        ttft_s=estimate.ttft_s,
        tpot_s=estimate.tpot_s,
        usd=estimate.cost_usd,
        resident_usd=estimate.main_usd + took_s * _functions_usd_per_s(system, actual),
        meets_slo=meets,
    )
    return Outcome(
        ways=ways,
        feasible=plan.feasible,
        remote_share=float(actual.remote.mean()),
        prediction_js=float(js_divergence(predicted.prefill, truth.prefill).mean()),
    )


def _functions_usd_per_s(system: System, plan: WholePlan) -> float:
    """All expert functions of a plan, held: each layer's spec and replicas."""
    used = plan.counts > 0
    each = system.remote.usd_per_s[plan.specs] * plan.replicas
    return float(each[used].sum())


def _baselines(host: Host, shape: Shape, system: System, demand: Demand) -> dict[str, Way]:
    """All of them hold all their memory for the whole request, so both bills are one."""
    whole = system.main.smallest(
        system.main_need_gb(shape.moe_layers * shape.experts, demand.tokens)
    )
    vcpus = float(system.main.vcpus[whole])
    rows = np.array([max(1.0, demand.prompt_tokens * shape.top_k / shape.experts)])
    one, many = (
        float(system.expert_times.seconds(at, vcpus)[0]) / host.gpu_expert_s(shape, float(at[0]))
        for at in (np.ones(1), rows)
    )
    return {
        way.name: Way(
            ttft_s=way.ttft_s,
            tpot_s=way.tpot_s,
            usd=way.cost_usd,
            resident_usd=way.cost_usd,
            meets_slo=True,
        )
        for way in baselines(
            system,
            demand,
            gpu_speedup=one,
            gpu_prefill_speedup=many,
            cpu_dense_s=(
                host.cpu_dense_s(shape, demand.prompt_tokens),
                host.cpu_dense_s(shape, 1.0),
            ),
        )
    }
