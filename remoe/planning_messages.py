"""What-if questions to the planner, and its explanations."""

from __future__ import annotations

from typing import Literal

import msgspec

from remoe.experts import Partition
from remoe.plan import Neighbour, Plan, Slo

__all__ = [
    "BaselineCost",
    "Explanation",
    "LayerExplanation",
    "PlanDiff",
    "PlanDiffRequest",
    "PreviewRequest",
    "PriceOverride",
    "RemoteExpert",
    "ValueChange",
]


class PriceOverride(msgspec.Struct, frozen=True, kw_only=True):
    """Unit prices to plan with, USD per GB·s; null keeps the price book's."""

    cpu_usd_per_gb_s: float | None = None
    gpu_usd_per_gb_s: float | None = None


class PreviewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A plan request with everything else one may ask "what if" about. Nothing comes of it.

    `prompt_length` and `decode_tokens` replace the prompt's length and the expected answer's, the
    prediction staying that of `prompt_tokens`. `ratio` is b, `rule` how it is chosen if not given.
    `partition` is priced as it is, and cannot be combined with `ratio` or `rule`. `granularity` is
    what one function holds: an expert, a layer, or a block of layers as deployed; `platform` whose
    memory specs to plan with; `robust` false compares SLOs with means. `streams` is as in a plan's
    request.
    """

    model: str
    prompt_tokens: list[int]
    max_new_tokens: int
    slo: Slo | None = None
    prompt_length: int | None = None
    decode_tokens: float | None = None
    prices: PriceOverride | None = None
    ratio: float | None = None
    rule: Literal["fixed", "largest", "cost", "per-layer"] | None = None
    partition: Partition | None = None
    granularity: Literal["expert", "layer", "block"] | None = None
    platform: Literal["proportional", "lambda", "cloud-run", "fargate"] | None = None
    robust: bool | None = None
    streams: int | None = None


class PlanDiffRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Two plans to compare, by the ids of plans made lately."""

    before: str
    after: str


class ValueChange(msgspec.Struct, frozen=True, kw_only=True):
    """A value in both plans; `change` is after less before, null where one is unknown."""

    before: float | None
    after: float | None
    change: float | None


class PlanDiff(msgspec.Struct, frozen=True, kw_only=True):
    """What changes from one plan to another; experts as [layer, index]."""

    before: str
    after: str
    becomes_remote: list[tuple[int, int]]
    becomes_local: list[tuple[int, int]]
    main_memory_gb: ValueChange
    ttft_s: ValueChange
    tpot_s: ValueChange
    cost_usd: ValueChange
    functions: dict[str, ValueChange]


class RemoteExpert(msgspec.Struct, frozen=True, kw_only=True):
    """Why an expert is remote: `rank` is its place among the layer's experts, 1 the most used."""

    expert: int
    expected_routes: float
    rank: int


class LayerExplanation(msgspec.Struct, frozen=True, kw_only=True):
    """One layer with experts: shares of both phases, and what being remote costs there.

    `least_used_local_routes` is what the last expert that stays gets; every remote one gets at
    most as many, unless the partition was another request's. `call_chance` is how likely one
    decoded token calls the layer's function.
    """

    layer: int
    function: str | None
    prefill_shares: list[float]
    decode_shares: list[float]
    remote: list[RemoteExpert]
    least_used_local_routes: float | None
    call_chance: float


class BaselineCost(msgspec.Struct, frozen=True, kw_only=True):
    """The same request served otherwise (the paper's baselines, A.13), warm.

    `assumes` says what of it was not measured.
    """

    name: str
    ttft_s: float
    tpot_s: float
    cost_usd: float
    assumes: str | None = None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A plan and the reasons for it. `why` is in sentences, `baselines` empty without a profile."""

    plan: Plan
    prompt_tokens: int
    decode_tokens: float
    origin_of_partition: Literal["this request", "deployed"]
    neighbours: list[Neighbour]
    layers: list[LayerExplanation]
    baselines: list[BaselineCost]
    why: list[str]
