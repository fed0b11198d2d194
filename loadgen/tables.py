"""A run's figures as tables: the same rows for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadgen.bill import Cost, Experts
from loadgen.measures import Summary
from loadgen.results import RunResult
from loadgen.slo import SloResult
from loadgen.statistics import Distribution

__all__ = ["ABSENT", "Table", "header_lines", "number", "share", "tables_of", "warnings_of"]

ABSENT = "-"
_LATE_MS = 50.0
_DISTRIBUTION = ("n", "mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True)
class Table:
    """`columns` are headings; the first cell of a row is its name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def header_lines(result: RunResult) -> list[tuple[str, str]]:
    """What a reader must know before any number."""
    config, target = result.config, result.target
    arrivals = {
        "trace": f"trace {target.trace}"
        + (f", {config.speedup:g} times as fast" if config.speedup != 1 else ""),
        "closed": f"closed loop, {config.concurrency} at a time",
    }.get(config.arrivals, f"{config.arrivals} arrivals, {config.stages}")
    if config.arrivals == "gamma":
        arrivals += f", burstiness {config.burstiness:g}"
    window = f"from {config.start_s:g} s" + (f" to {config.end_s:g} s" if config.end_s else "")
    plans = sorted(
        {
            record.receipt.deployment_plan_id
            for record in result.records
            if record.receipt and record.receipt.deployment_plan_id
        }
    )
    return [
        ("target", f"{target.url} ({target.endpoint})"),
        ("model", target.model),
        ("arrivals", f"{arrivals}; {window}, sample {config.sample:g}, seed {config.seed}"),
        ("prompts", f"{target.corpus}; cut {target.counted}"),
        ("deployment plans", ", ".join(plans[:3]) + (" ..." if len(plans) > 3 else "") or ABSENT),
        ("load generator", f"remoe {target.remoe_version}, {target.git_sha or 'no checkout'}"),
        ("host", target.host),
    ]


def warnings_of(result: RunResult) -> list[str]:
    """What a reader must not overlook, the worst first."""
    summary, target = result.summary, result.target
    warnings = []
    if target.stopped:
        warnings.append(f"The run was stopped: {target.stopped}.")
    seen = len([record for record in result.records if not record.warm_up])
    if seen < summary.requests.planned and not target.stopped:
        warnings.append(
            f"{seen} of {summary.requests.planned} requests have a record: the run was cut off."
        )
    lag_ms = summary.latency.lag_ms.p99
    if lag_ms is not None and lag_ms > _LATE_MS:
        warnings.append(
            f"The load generator was late itself: p99 of the schedule lag is {number(lag_ms)} ms. "
            "The load was smoother than planned; read E2E from schedule, or send less from here."
        )
    if summary.requests.skipped:
        warnings.append(
            f"{summary.requests.skipped} arrivals were skipped, since {result.config.max_in_flight} "
            "requests were in flight."
        )
    return warnings


def tables_of(summary: Summary) -> list[Table]:
    """The tables in reading order; parts that the server does not report are left out."""
    tables = [_requests(summary), _latency(summary), _tokens(summary)]
    if summary.cold_starts is not None or summary.platform is not None:
        tables.append(_cold_starts(summary))
    if summary.experts is not None:
        tables.append(_experts(summary.experts))
    if summary.cost is not None:
        tables.append(_cost(summary, summary.cost))
    if summary.slo:
        tables.append(_slo(summary, summary.slo))
    return tables


def number(value: float | None, digits: int = 4) -> str:
    """Enough digits to compare, never more."""
    if value is None:
        return ABSENT
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def _distribution_row(name: str, of: Distribution) -> tuple[str, ...]:
    return (name, *(number(getattr(of, column)) for column in _DISTRIBUTION))


def _requests(summary: Summary) -> Table:
    requests = summary.requests
    rows = [
        ("planned", number(requests.planned)),
        ("completed", number(requests.completed)),
        *(
            (name, number(count))
            for name, count in (
                ("failed", requests.failed),
                ("incomplete", requests.incomplete),
                ("cut off by the end", requests.cancelled),
                ("skipped, too many in flight", requests.skipped),
            )
            if count
        ),
        ("duration", f"{summary.duration_s:.1f} s"),
        ("offered", f"{number(requests.offered_rps)} requests/s"),
        ("completed", f"{number(requests.throughput_rps)} requests/s"),
        ("most in flight", number(requests.most_in_flight)),
    ]
    for group in requests.errors:
        example = f": {group.examples[0][:100]}" if group.examples else ""
        rows.append((f"error: {group.label}", f"{group.count}{example}"))
    return Table("Requests", ("", ""), tuple(rows))


def _latency(summary: Summary) -> Table:
    latency = summary.latency
    return Table(
        "Latency, ms",
        ("", *_DISTRIBUTION),
        (
            _distribution_row("TTFT", latency.ttft_ms),
            _distribution_row("TPOT", latency.tpot_ms),
            _distribution_row("ITL", latency.itl_ms),
            _distribution_row("E2E", latency.e2e_ms),
            _distribution_row("E2E from schedule", latency.e2e_from_schedule_ms),
            _distribution_row("schedule lag", latency.lag_ms),
        ),
    )


def _tokens(summary: Summary) -> Table:
    tokens = summary.tokens
    rows = [
        ("prompt", number(tokens.prompt)),
        ("output", number(tokens.output)),
        ("output", f"{number(tokens.output_per_s)} tokens/s"),
        ("most in one second", f"{number(tokens.most_output_per_s)} chunks"),
        ("prompt and output", f"{number(tokens.total_per_s)} tokens/s"),
        ("prompt tokens against asked", share(tokens.prompt_ratio)),
        ("output tokens against asked", share(tokens.output_ratio)),
        ("answers not as long as asked", number(tokens.off_length)),
        ("counted by", tokens.counted_by),
    ]
    return Table("Tokens", ("", ""), tuple(rows))


def _cold_starts(summary: Summary) -> Table:
    rows: list[tuple[str, ...]] = []
    cold, platform = summary.cold_starts, summary.platform
    if cold is not None:
        rows += [
            (
                "requests that waited",
                f"{cold.touched} of {cold.known} ({share(cold.touched_share)})",
            ),
            (
                "their wait, p50 / p99",
                f"{number(cold.wait_ms.p50)} / {number(cold.wait_ms.p99)} ms",
            ),
            (
                "of it for the main function",
                f"p50 {number(cold.main_ms.p50)} ms, n = {cold.main_ms.n}",
            ),
            ("of it for experts", f"p50 {number(cold.experts_ms.p50)} ms, n = {cold.experts_ms.n}"),
        ]
    if platform is not None:
        mean = platform.cold_start_total_ms / platform.cold_starts if platform.cold_starts else None
        rows += [
            ("function starts", f"{platform.cold_starts}, {number(mean)} ms each"),
            ("most replicas", number(platform.most_replicas)),
            ("memory held", f"{number(platform.resident_gb_s)} GB·s"),
            ("idle share of it", share(platform.idle_share)),
        ]
    return Table("Cold starts", ("", ""), tuple(rows))


def _experts(experts: Experts) -> Table:
    rows = [
        ("hit rate, predicted", share(experts.predicted_hit_rate)),
        ("hit rate, actual", share(experts.hit_rate)),
        ("remote calls", f"{number(experts.remote_calls)}"),
        ("remote calls per output token", number(experts.remote_calls_per_token)),
        ("remote bytes per output token", number(experts.remote_bytes_per_token)),
        ("calls sent again", number(experts.remote_retries)),
        ("layers computed locally instead", number(experts.local_fallbacks)),
        ("requests without a plan", number(experts.degraded)),
    ]
    return Table("Experts", ("", ""), _known(rows))


def _cost(summary: Summary, cost: Cost) -> Table:
    each = cost.per_request_usd
    rows = [
        ("by", cost.source),
        ("in all", f"{number(cost.total_usd)} USD"),
        ("per request, mean", f"{number(each.mean)} USD"),
        ("per request, p50 / p99", f"{number(each.p50)} / {number(each.p99)} USD"),
        ("per million output tokens", f"{number(cost.per_million_output_tokens_usd)} USD"),
        ("per million tokens", f"{number(cost.per_million_tokens_usd)} USD"),
        ("predicted over actual", share(cost.predicted_over_actual)),
        ("resident ledger, in all", f"{number(cost.resident_usd)} USD"),
        ("main function", f"{number(cost.main_gb_s)} GB·s"),
        ("of it GPU", f"{number(cost.main_gpu_gb_s)} GB·s"),
        ("expert functions", f"{number(cost.remote_gb_s)} GB·s"),
    ]
    return Table("Cost", ("", ""), _known(rows))


def _known(rows: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Without the rows that the server does not report."""
    return tuple(row for row in rows if not row[1].startswith(ABSENT))


def _slo(summary: Summary, results: Sequence[SloResult]) -> Table:
    rows = [
        (result.objective, _shown(result), "met" if result.passed else "MISSED")
        for result in results
    ]
    goodput = f"{number(summary.goodput_rps)} requests/s, {share(summary.goodput_share)}"
    rows.append(("goodput (requests within every bound)", goodput, ""))
    return Table("SLO", ("objective", "actual", ""), tuple(rows))


def _shown(result: SloResult) -> str:
    if result.actual is None:
        return "not measured"
    name = result.objective.split("<")[0].split(">")[0].strip()
    if name.startswith(("ttft_", "tpot_", "itl_", "e2e_", "lag_")):
        return f"{number(result.actual * 1e3)} ms"
    if name in {"ttft", "tpot", "e2e", "lag"}:
        return f"{result.actual:.1%} of requests"
    return share(result.actual) if name in {"goodput", "error_rate"} else number(result.actual)
