"""From records to figures: requests, latency, throughput, tokens, goodput.

Latencies are of completed requests. Every distribution says how many values it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from loadgen.bill import ColdStarts, Cost, Experts, cold_starts_of, cost_of, experts_of
from loadgen.platform import PlatformFigures, PlatformSample, platform_figures
from loadgen.record import RequestRecord
from loadgen.slo import Objective, SloResult, judge, meets_all
from loadgen.statistics import Distribution

__all__ = [
    "ErrorGroup",
    "Latency",
    "Requests",
    "Summary",
    "Tokens",
    "summarize",
    "token_times",
]

_ERROR_EXAMPLES = 3


class ErrorGroup(msgspec.Struct, frozen=True, kw_only=True):
    label: str
    count: int
    examples: list[str]


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """`throughput_rps` counts completed requests; `offered_rps` the planned arrivals."""

    planned: int
    completed: int
    failed: int
    incomplete: int
    cancelled: int
    skipped: int
    offered_rps: float | None
    throughput_rps: float
    most_in_flight: int
    errors: list[ErrorGroup]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds. `e2e_from_schedule_ms` counts from the intended arrival: with a late sender or
    a slow server it is what users would have waited (no coordinated omission)."""

    ttft_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2e_ms: Distribution
    e2e_from_schedule_ms: Distribution
    lag_ms: Distribution
    ntpot_ms: Distribution


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """prompt_ratio, output_ratio: what the server counted over what was asked for, in all.
    off_length: completed requests whose output is not as long as asked."""

    prompt: int
    output: int
    output_per_s: float
    total_per_s: float
    most_output_per_s: float
    counted_by: str
    prompt_ratio: float | None
    output_ratio: float | None
    off_length: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a run says in numbers. Parts are None where the server does not report them."""

    duration_s: float
    requests: Requests
    latency: Latency
    tokens: Tokens
    goodput_rps: float | None
    goodput_share: float | None
    token_goodput_per_s: float | None
    cold_starts: ColdStarts | None
    experts: Experts | None
    cost: Cost | None
    platform: PlatformFigures | None
    slo: list[SloResult]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.slo)


def summarize(
    records: Sequence[RequestRecord],
    *,
    objectives: Sequence[Objective] = (),
    samples: Sequence[PlatformSample] = (),
    usd_per_hour: float | None = None,
    planned: int | None = None,
    span_s: float | None = None,
) -> Summary:
    """Summarize the measured records (warm-ups are left out).

    The duration is from the run's zero to the last byte of the last request. `planned` and
    `span_s` (the last intended arrival) give the offered rate.
    """
    measured = [record for record in records if not record.warm_up]
    done = [record for record in measured if record.status == "completed"]
    ends = [record.last_s for record in measured if record.last_s is not None]
    duration_s = max([0.0, *ends])
    requests = _requests(measured, len(done), duration_s, planned, span_s)
    tokens = _tokens(done, duration_s)
    good = [record for record in measured if meets_all(record, objectives)]
    share = len(good) / len(measured) if measured else None
    receipts = [record.receipt for record in done if record.receipt is not None]
    cost = cost_of(done, duration_s, usd_per_hour)
    figures = {
        "goodput": share,
        "error_rate": 1 - len(done) / len(measured) if measured else None,
        "request_throughput": requests.throughput_rps,
        "output_throughput": tokens.output_per_s,
        "cost_per_request": cost.per_request_usd.mean if cost else None,
    }
    return Summary(
        duration_s=duration_s,
        requests=requests,
        latency=_latency(measured, done),
        tokens=tokens,
        goodput_rps=_per(len(good), duration_s) if objectives else None,
        goodput_share=share if objectives else None,
        token_goodput_per_s=_per(sum(r.tokens for r in good), duration_s) if objectives else None,
        cold_starts=cold_starts_of(receipts),
        experts=experts_of(receipts, tokens.output),
        cost=cost,
        platform=platform_figures(samples),
        slo=judge(
            measured,
            objectives,
            {name: value for name, value in figures.items() if value is not None},
        ),
    )


def token_times(record: RequestRecord) -> list[float]:
    """When each chunk with text came, in seconds since the run's zero."""
    if record.first_token_s is None:
        return []
    return [record.first_token_s, *(record.first_token_s + np.cumsum(record.itl_s)).tolist()]


def _per(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _requests(
    records: Sequence[RequestRecord],
    completed: int,
    duration_s: float,
    planned: int | None,
    span_s: float | None,
) -> Requests:
    counts = Counter(record.status for record in records)
    labels = Counter(record.error for record in records if record.error)
    groups = [
        ErrorGroup(
            label=label,
            count=count,
            examples=list(
                dict.fromkeys(
                    record.error_detail
                    for record in records
                    if record.error == label and record.error_detail
                )
            )[:_ERROR_EXAMPLES],
        )
        for label, count in labels.most_common()
    ]
    planned = len(records) if planned is None else planned
    return Requests(
        planned=planned,
        completed=completed,
        failed=counts["failed"],
        incomplete=counts["incomplete"],
        cancelled=counts["cancelled"],
        skipped=counts["skipped"],
        offered_rps=planned / span_s if span_s else None,
        throughput_rps=_per(completed, duration_s),
        most_in_flight=_most_in_flight(records),
        errors=groups,
    )


def _most_in_flight(records: Sequence[RequestRecord]) -> int:
    changes = sorted(
        [(record.sent_s, 1) for record in records if record.sent_s is not None]
        + [
            (record.last_s, -1)
            for record in records
            if record.sent_s is not None and record.last_s is not None
        ]
    )
    return int(max(np.cumsum([change for _, change in changes]), default=0))


def _latency(measured: Sequence[RequestRecord], done: Sequence[RequestRecord]) -> Latency:
    def milliseconds(of: Callable[[RequestRecord], float | None]) -> Distribution:
        return Distribution.of((of(record) for record in done), 1e3)

    def from_schedule(record: RequestRecord) -> float | None:
        if record.last_s is None or record.intended_s is None:
            return None
        return record.last_s - record.intended_s

    def ntpot(record: RequestRecord) -> float | None:
        return record.e2e_s / record.tokens if record.e2e_s is not None and record.tokens else None

    return Latency(
        ttft_ms=milliseconds(lambda record: record.ttft_s),
        tpot_ms=milliseconds(lambda record: record.tpot_s),
        itl_ms=Distribution.of((gap for record in done for gap in record.itl_s), 1e3),
        e2e_ms=milliseconds(lambda record: record.e2e_s),
        e2e_from_schedule_ms=milliseconds(from_schedule),
        lag_ms=Distribution.of((record.lag_s for record in measured), 1e3),
        ntpot_ms=milliseconds(ntpot),
    )


def _tokens(done: Sequence[RequestRecord], duration_s: float) -> Tokens:
    output = sum(record.tokens for record in done)
    prompt = sum(record.prompt_tokens or 0 for record in done)
    by_usage = sum(record.output_tokens is not None for record in done)
    moments = np.array([moment for record in done for moment in token_times(record)])
    most = int(np.bincount(moments.clip(0).astype(int)).max()) if moments.size else 0
    counted = [record for record in done if record.prompt_tokens and record.asked_prompt_tokens]
    asked_prompt = sum(record.asked_prompt_tokens or 0 for record in counted)
    asked_output = sum(record.asked_output_tokens or 0 for record in done)
    return Tokens(
        prompt=prompt,
        output=output,
        output_per_s=_per(output, duration_s),
        total_per_s=_per(output + prompt, duration_s),
        most_output_per_s=float(most),
        counted_by="usage"
        if by_usage == len(done)
        else f"usage for {by_usage} of {len(done)} requests, chunks for the others",
        prompt_ratio=sum(record.prompt_tokens or 0 for record in counted) / asked_prompt
        if asked_prompt
        else None,
        output_ratio=output / asked_output if asked_output else None,
        off_length=sum(
            record.asked_output_tokens is not None and record.tokens != record.asked_output_tokens
            for record in done
        ),
    )
