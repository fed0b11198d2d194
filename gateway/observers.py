"""Adapters of the gateway's events: one JSON line a request, and Prometheus metrics."""

from __future__ import annotations

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from gateway.events import RequestFinished

__all__ = ["Metrics", "log_request"]

_log = structlog.get_logger()
_QUIET_ROUTES = frozenset({"/", "/healthz", "/readyz", "/metrics"})
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6)


def log_request(event: RequestFinished) -> None:
    """Write the request's one line; health checks are only seen at debug level."""
    trace = event.trace
    receipt = trace.receipt
    fields: dict[str, object] = {
        "request_id": trace.request_id,
        "route": trace.route,
        "status": trace.status,
        "elapsed_ms": round(event.elapsed_s * 1e3, 1),
    }
    if trace.error_code is not None:
        fields["error_code"] = trace.error_code
    if receipt is not None:
        fields |= {
            "plan_id": receipt.plan_id,
            "streamed": trace.streamed,
            "prompt_tokens": trace.prompt_tokens,
            "completion_tokens": trace.completion_tokens,
            "ttft_ms": receipt.ttft_ms,
            "tpot_ms": receipt.tpot_ms,
            "cold_start_ms": receipt.cold_start_ms,
            "remote_calls": receipt.remote_calls,
            "cost_usd": receipt.cost_usd,
        }
    (_log.debug if trace.route in _QUIET_ROUTES else _log.info)("request", **fields)


class Metrics:
    """Prometheus adapter with a registry of its own; labels are small closed sets."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "remoe_requests",
            "HTTP requests by route and status (499: the client left)",
            ["route", "status"],
            registry=self._registry,
        )
        self._ttft = self._histogram(
            "remoe_time_to_first_token_seconds", "From arrival to the first token out"
        )
        self._tpot = Histogram(
            "remoe_time_per_output_token_seconds",
            "Mean time per output token after the first, per request",
            registry=self._registry,
            buckets=_TOKEN_SECONDS,
        )
        self._cold_starts = Histogram(
            "remoe_cold_start_seconds",
            "What requests waited for functions at zero; warm requests are not counted",
            ["function"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._cost = self._counter(
            "remoe_cost_usd", "Cost of finished requests by the price book", "part"
        )
        self._tokens = self._counter("remoe_tokens", "Tokens of finished requests", "kind")
        self._plans = self._counter(
            "remoe_plans", "Requests that had a plan, or went on without one", "outcome"
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, registry=self._registry, buckets=_SECONDS)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, [label], registry=self._registry)

    def observe(self, event: RequestFinished) -> None:
        trace = event.trace
        self._requests.labels(trace.route, str(trace.status)).inc()
        receipt = trace.receipt
        if receipt is None:
            return
        self._tokens.labels("prompt").inc(trace.prompt_tokens)
        self._tokens.labels("completion").inc(trace.completion_tokens)
        self._plans.labels(receipt.plan).inc()
        if receipt.ttft_ms is not None:
            self._ttft.observe(receipt.ttft_ms / 1e3)
        if receipt.tpot_ms is not None:
            self._tpot.observe(receipt.tpot_ms / 1e3)
        for function, cold_ms in (
            ("main", receipt.cold_start.main_ms),
            ("experts", receipt.cold_start.experts_ms),
        ):
            if cold_ms > 0:
                self._cold_starts.labels(function).observe(cold_ms / 1e3)
        if receipt.cost is not None:
            self._cost.labels("main_gpu").inc(receipt.cost.main_gpu_usd)
            self._cost.labels("main_cpu").inc(receipt.cost.main_cpu_usd)
            self._cost.labels("remote").inc(receipt.cost.remote_usd)

    def render(self) -> bytes:
        """The metrics page, in Prometheus' text format."""
        return generate_latest(self._registry)
