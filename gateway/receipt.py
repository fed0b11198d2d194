"""`x_remoe`: what a request got, what it used, what it cost, and what the plan had expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from remoe.generation import GenerationStats
from remoe.ledger import Ledger
from remoe.plan import Plan
from remoe.prices import PriceBook

__all__ = [
    "WARM",
    "ChoiceRecord",
    "ColdStart",
    "CostSplit",
    "MainColdStart",
    "Predicted",
    "Receipt",
    "build_receipt",
]


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds this request waited for functions that were at zero.

    main_ms is the sum of activation_ms (until a process was started for it), boot_ms (until its
    libraries were there) and load_ms (until it had the model and was ready).
    """

    main_ms: float
    activation_ms: float
    boot_ms: float
    load_ms: float
    experts_ms: float


class CostSplit(msgspec.Struct, frozen=True, kw_only=True):
    """`cost_usd` by where the money went."""

    main_gpu_usd: float
    main_cpu_usd: float
    remote_usd: float


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan said before the request ran; null where the planner could not say."""

    ttft_ms: float | None
    tpot_ms: float | None
    cost_usd: float | None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The `x_remoe` object beside OpenAI's fields. Several choices are added up.

    plan_id: the plan made for the (first) prompt, null when `plan` is "degraded": the planner
        was down or late and the request went on without it.
    deployment_plan_id: the plan whose partition the main function had loaded.
    ttft_ms: from the request's arrival at the gateway to its first token leaving it.
    tpot_ms: mean time per output token after the first; null if no choice had a second.
    queue_ms: longest wait of a choice for its turn inside the main function.
    gateway_ms: time before the main function was asked: checks, chat template, tokens, plan.
    cold_start_ms: both parts of `cold_start` together.
    main_gb_s, remote_gb_s: memory held times seconds busy, in the main and the expert functions.
    cost_usd: null when the main function did not report what was used.
    """

    plan_id: str | None
    plan: Literal["planned", "degraded"]
    deployment_plan_id: str | None
    ttft_ms: float | None
    tpot_ms: float | None
    queue_ms: float | None
    gateway_ms: float
    cold_start_ms: float
    cold_start: ColdStart
    remote_calls: int
    remote_bytes: int
    remote_retries: int
    local_fallbacks: int
    main_gb_s: float | None
    remote_gb_s: float | None
    cost_usd: float | None
    cost: CostSplit | None
    price_book: str
    predicted: Predicted


@dataclass(frozen=True, slots=True)
class MainColdStart:
    """The parts of a main function's start that one request waited for, in seconds."""

    activation_s: float = 0.0
    boot_s: float = 0.0
    load_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.activation_s + self.boot_s + self.load_s


WARM = MainColdStart()


@dataclass(slots=True)
class ChoiceRecord:
    """What is measured of one choice while it runs. Times are seconds of one monotonic clock."""

    tokens: int = 0
    cold_start: MainColdStart = WARM
    first_token_at: float | None = None
    last_token_at: float | None = None
    stats: GenerationStats | None = None

    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None before the second."""
        if self.first_token_at is None or self.last_token_at is None or self.tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.tokens - 1)


def build_receipt(
    *,
    received_at: float,
    asked_at: float,
    plans: Sequence[Plan | None],
    samples: int,
    records: Sequence[ChoiceRecord],
    prices: PriceBook,
) -> Receipt:
    """Add the choices up. `asked_at` is when the main function was first asked."""
    stats = [record.stats for record in records if record.stats is not None]
    complete = len(stats) == len(records)
    ledger = _sum([stat.ledger for stat in stats])
    cost = ledger.cost(prices)
    cold = max((record.cold_start for record in records), key=lambda c: c.total_s, default=WARM)
    firsts = [record.first_token_at for record in records if record.first_token_at is not None]
    known = [plan for plan in plans if plan is not None]
    return Receipt(
        plan_id=plans[0].plan_id if plans and plans[0] else None,
        plan="planned" if len(known) == len(plans) else "degraded",
        deployment_plan_id=stats[0].deployment_plan_id if stats else None,
        ttft_ms=_ms(min(firsts) - received_at) if firsts else None,
        tpot_ms=_mean_tpot_ms(records),
        queue_ms=_ms(max(stat.queue_s for stat in stats)) if stats else None,
        gateway_ms=_ms(asked_at - received_at),
        cold_start_ms=_ms(cold.total_s + ledger.remote_cold_start_s),
        cold_start=ColdStart(
            main_ms=_ms(cold.total_s),
            activation_ms=_ms(cold.activation_s),
            boot_ms=_ms(cold.boot_s),
            load_ms=_ms(cold.load_s),
            experts_ms=_ms(ledger.remote_cold_start_s),
        ),
        remote_calls=ledger.remote_calls,
        remote_bytes=ledger.remote_bytes,
        remote_retries=ledger.remote_retries,
        local_fallbacks=ledger.local_fallbacks,
        main_gb_s=ledger.main_gpu_gb_s + ledger.main_cpu_gb_s if complete else None,
        remote_gb_s=ledger.remote_gb_s if complete else None,
        cost_usd=cost.total_usd if complete else None,
        cost=CostSplit(
            main_gpu_usd=cost.main_gpu_usd,
            main_cpu_usd=cost.main_cpu_usd,
            remote_usd=cost.remote_usd,
        )
        if complete
        else None,
        price_book=prices.name,
        predicted=_predicted(known, len(plans), samples),
    )


def _predicted(known: list[Plan], prompts: int, samples: int) -> Predicted:
    """Latencies of the slowest prompt; costs of all prompts and samples together."""
    ttfts = [plan.predicted_ttft_s for plan in known if plan.predicted_ttft_s is not None]
    tpots = [plan.predicted_tpot_s for plan in known if plan.predicted_tpot_s is not None]
    costs = [plan.predicted_cost_usd for plan in known if plan.predicted_cost_usd is not None]
    return Predicted(
        ttft_ms=_ms(max(ttfts)) if ttfts else None,
        tpot_ms=_ms(max(tpots)) if tpots else None,
        cost_usd=sum(costs) * samples if costs and len(costs) == prompts else None,
    )


def _mean_tpot_ms(records: Sequence[ChoiceRecord]) -> float | None:
    seconds = steps = 0.0
    for record in records:
        tpot_s = record.tpot_s()
        if tpot_s is not None:
            seconds += tpot_s * (record.tokens - 1)
            steps += record.tokens - 1
    return _ms(seconds / steps) if steps else None


def _sum(ledgers: Sequence[Ledger]) -> Ledger:
    return Ledger(
        **{
            name: sum(getattr(ledger, name) for ledger in ledgers)
            for name in Ledger.__struct_fields__
        }
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
