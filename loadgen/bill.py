"""What `x_remoe` adds: cold starts, experts, and the bill; with a machine's price for any server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from loadgen.receipt import Receipt
from loadgen.record import RequestRecord
from loadgen.statistics import Distribution

__all__ = ["ColdStarts", "Cost", "Experts", "cold_starts_of", "cost_of", "experts_of"]


class ColdStarts(msgspec.Struct, frozen=True, kw_only=True):
    """Of requests that say in `x_remoe` that they waited for a function at zero."""

    known: int
    touched: int
    touched_share: float | None
    wait_ms: Distribution
    main_ms: Distribution
    experts_ms: Distribution


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """Hit rate: the share of routes to experts resident in the main function."""

    predicted_hit_rate: float | None
    hit_rate: float | None
    remote_calls: int
    remote_calls_per_token: float | None
    remote_bytes: int
    remote_bytes_per_token: float | None
    remote_retries: int
    local_fallbacks: int
    degraded: int


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """`source` says by which ledger: the server's receipts, or an hourly price of the machine.

    resident_usd: the receipts' other ledger, by all memory held while each request was there.
    per_million_tokens_usd counts prompt and output tokens; the other one output tokens only.
    """

    source: str
    total_usd: float
    per_request_usd: Distribution
    per_million_output_tokens_usd: float | None
    per_million_tokens_usd: float | None
    resident_usd: float | None
    main_gb_s: float | None
    remote_gb_s: float | None
    main_gpu_gb_s: float | None
    predicted_usd: float | None
    predicted_over_actual: float | None


def cold_starts_of(receipts: Sequence[Receipt]) -> ColdStarts | None:
    if not receipts:
        return None
    touched = [receipt for receipt in receipts if receipt.cold_start_ms > 0]
    return ColdStarts(
        known=len(receipts),
        touched=len(touched),
        touched_share=len(touched) / len(receipts),
        wait_ms=Distribution.of(receipt.cold_start_ms for receipt in touched),
        main_ms=Distribution.of(
            receipt.cold_start.main_ms for receipt in touched if receipt.cold_start.main_ms
        ),
        experts_ms=Distribution.of(
            receipt.cold_start.experts_ms for receipt in touched if receipt.cold_start.experts_ms
        ),
    )


def experts_of(receipts: Sequence[Receipt], output_tokens: int) -> Experts | None:
    if not receipts:
        return None
    calls = sum(receipt.remote_calls for receipt in receipts)
    sent = sum(receipt.remote_bytes for receipt in receipts)
    return Experts(
        predicted_hit_rate=Distribution.of(
            receipt.predicted.hit_rate for receipt in receipts if receipt.predicted
        ).mean,
        hit_rate=Distribution.of(receipt.hit_rate for receipt in receipts).mean,
        remote_calls=calls,
        remote_calls_per_token=calls / output_tokens if output_tokens else None,
        remote_bytes=sent,
        remote_bytes_per_token=sent / output_tokens if output_tokens else None,
        remote_retries=sum(receipt.remote_retries for receipt in receipts),
        local_fallbacks=sum(receipt.local_fallbacks for receipt in receipts),
        degraded=sum(receipt.plan == "degraded" for receipt in receipts),
    )


def cost_of(
    done: Sequence[RequestRecord],
    duration_s: float,
    usd_per_hour: float | None,
) -> Cost | None:
    receipts = [record.receipt for record in done if record.receipt is not None]
    priced = [receipt for receipt in receipts if receipt.cost_usd is not None]
    billed = done
    if usd_per_hour is not None and done:
        total = usd_per_hour * duration_s / 3600
        source = f"{usd_per_hour:g} USD an hour for {duration_s:.0f} s"
        each = Distribution.of([total / len(done)] * len(done))
    elif priced:
        billed = [r for r in done if r.receipt is not None and r.receipt.cost_usd is not None]
        total = sum(receipt.cost_usd or 0.0 for receipt in priced)
        books = sorted({receipt.price_book or "unnamed" for receipt in priced})
        source = f"the server's receipts of {len(priced)} requests, by {', '.join(books)}"
        each = Distribution.of(receipt.cost_usd for receipt in priced)
    else:
        return None
    resident = [
        receipt.resident.cost_usd
        for receipt in receipts
        if receipt.resident and receipt.resident.cost_usd is not None
    ]
    output = sum(record.tokens for record in billed)
    prompt = sum(record.prompt_tokens or 0 for record in billed)
    both = [
        (receipt.predicted.cost_usd, receipt.cost_usd)
        for receipt in priced
        if receipt.predicted and receipt.predicted.cost_usd is not None
    ]
    predicted = sum(cost for cost, _ in both)
    actual = sum(cost or 0.0 for _, cost in both)
    return Cost(
        source=source,
        total_usd=total,
        per_request_usd=each,
        per_million_output_tokens_usd=total / output * 1e6 if output else None,
        per_million_tokens_usd=total / (output + prompt) * 1e6 if output + prompt else None,
        resident_usd=sum(resident) if resident else None,
        main_gb_s=_sum_of(receipt.main_gb_s for receipt in receipts),
        remote_gb_s=_sum_of(receipt.remote_gb_s for receipt in receipts),
        main_gpu_gb_s=_sum_of(receipt.main_gpu_gb_s for receipt in receipts),
        predicted_usd=predicted if both else None,
        predicted_over_actual=predicted / actual if actual else None,
    )


def _sum_of(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
