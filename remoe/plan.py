"""What the planner is asked and what it answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from remoe.experts import Partition
from remoe.ledger import Ledger
from remoe.moeless.function_balance import Policy

__all__ = [
    "CostSplit",
    "Deployment",
    "FunctionForecast",
    "Neighbour",
    "Observation",
    "Plan",
    "PlanRequest",
    "PlanStatus",
    "PolicyForecast",
    "Slo",
]

PlanStatus = Literal["feasible", "infeasible", "unknown"]


class Slo(msgspec.Struct, frozen=True):
    """Latency a request asks for, in seconds: time to first token, time per output token."""

    ttft_s: float
    tpot_s: float


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`prompt_tokens` are the model's own token ids, chat template included.

    With `streams` the policies are compared, for as many such requests side by side.
    """

    model: str
    prompt_tokens: list[int]
    max_new_tokens: int
    slo: Slo | None = None
    streams: int | None = None


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """One of the similar prompts a prediction rests on (SPS, A.7)."""

    history_id: int
    topic: str
    similarity: float
    weight: float


class FunctionForecast(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan expects of one expert function: routes and calls to it, and its memory.

    `vcpus` are what the platform gives with that memory; null without a hardware profile.
    """

    name: str
    expected_routes: float
    memory_gb: float
    replicas: int
    expected_calls: float | None = None
    vcpus: float | None = None


class CostSplit(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's predicted cost goes: C^loc, and C^rem of prefill and of decode (A.4)."""

    main_usd: float
    remote_prefill_usd: float
    remote_decode_usd: float


class PolicyForecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a request takes under a policy beside others like it, everything warm.

    `cost_usd` bills memory while it is computed on, as a plan's cost does, `resident_usd` all that
    is held meanwhile: the request's share of both. `held_gb` is held while tokens are written,
    `moved_in` how many experts are then in the main function beyond the plan. `slo_*` are what an
    SLO is compared with.
    """

    policy: Policy
    ttft_s: float
    tpot_s: float | None
    slo_ttft_s: float
    slo_tpot_s: float | None
    cost_usd: float
    resident_usd: float
    held_gb: float
    moved_in: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Which experts are remote for a request, what that will cost, and why.

    `profile` is the predicted activation profile of the whole request, [layers][experts]: prefill
    and decode, mixed by their expected tokens.
    `prewarm` names the expert functions this request will most likely call.
    `predicted_*` are means. An SLO is compared with `slo_ttft_s` and `slo_tpot_s`, which a request
    stays below with 97.5 % each, cold starts included. `status` is `infeasible` if no plan holds
    the SLO: `needed` is then the tightest that some plan does, each of the two for itself. It is
    `unknown` if nothing has been measured that would tell.
    `policies` are compared if the request said beside how many it is served and there is a hardware
    profile; `policy` is the one that holds the SLO at the least `resident_usd`.
    """

    plan_id: str
    model: str
    model_digest: str
    partition: Partition
    profile: list[list[float]]
    main_memory_gb: float
    functions: list[FunctionForecast]
    prewarm: list[str]
    neighbours: list[Neighbour]
    predicted_ttft_s: float | None
    predicted_tpot_s: float | None
    predicted_cost_usd: float | None
    feasible: bool = True
    status: PlanStatus = "unknown"
    needed: Slo | None = None
    cost_split: CostSplit | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    policies: list[PolicyForecast] = []
    policy: Policy | None = None


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What a main-model function is to load: the answer to a claim when it starts.

    `origin` says whether a waiting request's plan or the epoch plan (demand-weighted profile of
    the history) decided the partition. `profile` is how its requests are expected to use experts,
    [layers][experts], rows sum to 1 or to 0; a GPU keeps the hottest.
    """

    plan_id: str
    model_digest: str
    partition: Partition
    main_memory_gb: float
    origin: str
    profile: list[list[float]] | None = None


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished request really did; route counts are [layers][experts].

    `cold_start_s` is the part of `ttft_s` that was waiting for cold starts. Without the ledger the
    planner learns times, and no costs.
    """

    plan_id: str
    model_digest: str
    prompt_tokens: list[int]
    prefill_counts: list[list[int]]
    decode_counts: list[list[int]]
    ttft_s: float
    tpot_s: float | None
    cost_usd: float
    cold_start_s: float = 0.0
    ledger: Ledger | None = None
