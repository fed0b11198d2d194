"""`x_remoe`: what a request got, what it used, what it cost, and what the plan had expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from gateway.hits import count_hits, predicted_hit_rate
from gateway.residency import ResidentShare
from remoe.generation import GenerateEvent, GenerationStats
from remoe.ledger import Ledger
from remoe.money import Charge, Usage, gb_s, kb_s, price, usd
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
    "Resident",
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
    hit_rate: float | None


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """The request's share of all memory that was held while it was here, by `residency`.

    `starting_gb_s` is the part of replicas that were not ready yet: cold starts.
    """

    gb_s: float
    main_gb_s: float
    experts_gb_s: float
    services_gb_s: float
    starting_gb_s: float
    cost_usd: float | None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The `x_remoe` object beside OpenAI's fields. Several choices are added up.

    plan_id: the plan made for the (first) prompt, null when `plan` is "degraded": the planner
        was down or late and the request went on without it.
    deployment_plan_id: the plan whose partition the main function had loaded.
    ttft_ms: from the request's arrival at the gateway to its first token leaving it.
    tpot_ms: mean time per output token after the first; null if no choice had a second.
    queue_ms: longest wait of a choice for its turn inside the main function.
    gateway_ms: time before the main function was asked: checks, chat template, tokens; also the
        plan, unless the main function is known to run.
    cold_start_ms: both parts of `cold_start` together.
    total_ms: from the request's arrival to this receipt.
    hit_rate: share of routes that went to experts resident in the main function, by the plan's
        partition; null without a plan.
    main_gb_s, remote_gb_s: memory held times seconds busy, in the main and the expert functions;
        the first split in main_gpu_gb_s and main_cpu_gb_s. Exact to a millionth of a GB·s.
    cost_usd: exact to a nano-dollar; null when the main function did not report what was used,
        or used a GPU that the price book has no price for.
    resident: the resident ledger; null when no runtime tells which replicas are alive.
    """

    plan_id: str | None
    plan: Literal["planned", "degraded"]
    deployment_plan_id: str | None
    ttft_ms: float | None
    tpot_ms: float | None
    queue_ms: float | None
    gateway_ms: float
    total_ms: float
    cold_start_ms: float
    cold_start: ColdStart
    remote_calls: int
    remote_bytes: int
    remote_retries: int
    remote_hedges: int
    local_fallbacks: int
    hit_rate: float | None
    main_gb_s: float | None
    main_gpu_gb_s: float | None
    main_cpu_gb_s: float | None
    remote_gb_s: float | None
    cost_usd: float | None
    cost: CostSplit | None
    resident: Resident | None
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
    """What is measured of one choice while it runs. Times are seconds of one monotonic clock.

    `used` is as of the main function's last report, at most a second old while the choice runs;
    None if it finished without one.
    """

    tokens: int = 0
    cold_start: MainColdStart = WARM
    first_token_at: float | None = None
    last_token_at: float | None = None
    stats: GenerationStats | None = None
    used: Ledger | None = field(default_factory=Ledger)
    gaps_s: list[float] = field(default_factory=list)

    def came(self, now: float) -> None:
        """Note that new tokens are there; `gaps_s` is the time between such moments."""
        if self.last_token_at is None:
            self.first_token_at = now
        else:
            self.gaps_s.append(now - self.last_token_at)
        self.last_token_at = now

    def report(self, event: GenerateEvent) -> None:
        """Take what the event says of the work up to it."""
        if event.stats is not None:
            self.stats, self.used = event.stats, event.stats.ledger
        elif event.ledger is not None:
            self.used = event.ledger
        elif event.finish is not None and self.stats is None:
            self.used = None

    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None before the second."""
        if self.first_token_at is None or self.last_token_at is None or self.tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.tokens - 1)


def build_receipt(
    *,
    received_at: float,
    asked_at: float,
    now: float,
    plans: Sequence[Plan | None],
    samples: int,
    records: Sequence[ChoiceRecord],
    prices: PriceBook,
    resident: ResidentShare | None = None,
) -> Receipt:
    """Add the choices up. `asked_at` is when the main function was first asked."""
    stats = [record.stats for record in records if record.stats is not None]
    ledgers = [record.used for record in records if record.used is not None]
    complete = len(ledgers) == len(records)
    ledger = _sum(ledgers)
    usage = Usage.of(ledger)
    charge = Charge.of(usage, prices) if complete else None
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
        total_ms=_ms(now - received_at),
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
        remote_hedges=ledger.remote_hedges,
        local_fallbacks=ledger.local_fallbacks,
        hit_rate=_hit_rate(plans, samples, records),
        main_gb_s=gb_s(usage.main_gpu_kb_s + usage.main_cpu_kb_s) if complete else None,
        main_gpu_gb_s=gb_s(usage.main_gpu_kb_s) if complete else None,
        main_cpu_gb_s=gb_s(usage.main_cpu_kb_s) if complete else None,
        remote_gb_s=gb_s(usage.remote_kb_s) if complete else None,
        cost_usd=None if charge is None else usd(charge.total_nano_usd),
        cost=None if charge is None else _split(charge),
        resident=None if resident is None else _resident(resident, usage, prices),
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
        cost_usd=round(sum(costs) * samples, 9) if costs and len(costs) == prompts else None,
        hit_rate=_mean([predicted_hit_rate(plan) for plan in known]),
    )


def _split(charge: Charge) -> CostSplit:
    return CostSplit(
        main_gpu_usd=usd(charge.main_gpu_nano_usd),
        main_cpu_usd=usd(charge.main_cpu_nano_usd),
        remote_usd=usd(charge.remote_nano_usd),
    )


def _resident(share: ResidentShare, usage: Usage, prices: PriceBook) -> Resident:
    """The main function's memory is a GPU's to the part that it is in the busy ledger; all else is
    on CPUs."""
    main, experts = kb_s(share.main_gb_s), kb_s(share.experts_gb_s)
    services = kb_s(share.services_gb_s)
    busy = usage.main_gpu_kb_s + usage.main_cpu_kb_s
    on_gpu = main * usage.main_gpu_kb_s // busy if busy else 0
    gpu, cost = prices.gpu_usd_per_gb_s, None
    if gpu is not None or not on_gpu:
        on_cpus = main - on_gpu + experts + services
        cost = price(on_gpu, gpu or 0.0) + price(on_cpus, prices.cpu_usd_per_gb_s)
    return Resident(
        gb_s=gb_s(main + experts + services),
        main_gb_s=gb_s(main),
        experts_gb_s=gb_s(experts),
        services_gb_s=gb_s(services),
        starting_gb_s=gb_s(kb_s(share.starting_gb_s)),
        cost_usd=None if cost is None else usd(cost),
    )


def _hit_rate(
    plans: Sequence[Plan | None], samples: int, records: Sequence[ChoiceRecord]
) -> float | None:
    """Over all choices that had a plan and reported their routes."""
    hits = total = 0
    for index, record in enumerate(records):
        plan = plans[index // samples] if plans else None
        if plan is not None and record.stats is not None:
            part, whole = count_hits(plan, record.stats)
            hits += part
            total += whole
    return round(hits / total, 6) if total else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 6) if known else None


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
