"""The Prometheus adapter of the gateway's events; labels are small closed sets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from gateway.books import Books
from gateway.events import RequestFinished, Trace
from gateway.histogram import BulkHistogram
from gateway.hits import activation_error
from gateway.receipt import Receipt
from gateway.residency import ResidentMeter
from gateway.runtime_watch import RuntimeWatch
from remoe.balance_report import BalanceReport

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
_SHORT_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.33, 2, 4, 10)
_REPLICA_STATES = ("starting", "ready", "draining")


class Metrics:
    """Counts finished requests as they come, and looks at the rest when it is asked."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, *, books: Books, resident: ResidentMeter, watch: RuntimeWatch) -> None:
        self._books = books
        self._resident = resident
        self._watch = watch
        self._registry = CollectorRegistry()
        self._make_traffic()
        self._make_latencies()
        self._make_experts()
        self._make_balance()
        self._make_money()
        self._make_state()

    def _make_traffic(self) -> None:
        self._requests = cache(
            Counter(
                "remoe_requests",
                "HTTP requests by route and status (499: the client left)",
                ["route", "status"],
                registry=self._registry,
            ).labels
        )
        self._errors = self._counter("remoe_errors", "Requests that failed, by error code", "code")
        self._tokens = self._counter("remoe_tokens", "Tokens of finished requests", "kind")
        self._plans = self._counter(
            "remoe_plans", "Requests that had a plan, or went on without one", "outcome"
        )

    def _make_latencies(self) -> None:
        self._ttft = self._histogram(
            "remoe_time_to_first_token_seconds", "From arrival to the first token out"
        )
        self._tpot = self._histogram(
            "remoe_time_per_output_token_seconds",
            "Mean time per output token after the first, per request",
            _TOKEN_SECONDS,
        )
        self._itl = BulkHistogram(
            "remoe_inter_token_latency_seconds",
            "Time between one moment with new tokens and the next",
            _TOKEN_SECONDS,
            self._registry,
        )
        self._e2e = self._histogram("remoe_request_seconds", "From arrival to the whole answer")
        self._queue = self._histogram(
            "remoe_queue_seconds", "Waiting for a turn in the main function"
        )
        self._overhead = self._histogram(
            "remoe_gateway_seconds",
            "In the gateway before the main function was asked: checks, template, tokens, plan",
            _SHORT_SECONDS,
        )
        self._cold_starts = cache(
            Histogram(
                "remoe_cold_start_seconds",
                "What requests waited for functions at zero; warm requests are not counted",
                ["function"],
                registry=self._registry,
                buckets=_SECONDS,
            ).labels
        )

        self._cold_phases = cache(
            Histogram(
                "remoe_cold_start_phase_seconds",
                "What requests waited for a main function at zero, by phase of its start",
                ["phase"],
                registry=self._registry,
                buckets=_SECONDS,
            ).labels
        )

    def _make_experts(self) -> None:
        self._remote_calls = self._plain("remoe_remote_calls", "Calls to expert functions")
        self._remote_bytes = self._plain("remoe_remote_bytes", "Bytes of those calls, both ways")
        self._retries = self._plain("remoe_remote_retries", "Calls sent again after a break")
        self._hedges = self._plain("remoe_remote_hedges", "Late calls sent to another replica too")
        self._fallbacks = self._plain(
            "remoe_local_fallbacks", "Calls computed from the checkpoint: a function was lost"
        )
        self._hit_rate = cache(
            Histogram(
                "remoe_hit_rate",
                "Share of routes to experts in the main function, as planned and as it came",
                ["kind"],
                registry=self._registry,
                buckets=_SHARES,
            ).labels
        )
        self._activation_error = self._histogram(
            "remoe_activation_error",
            "Part of the routes that went elsewhere than predicted (total variation, 0 to 1)",
            _SHARES,
        )
        self._ratios = cache(
            Histogram(
                "remoe_actual_to_predicted",
                "What a request took, over what its plan had said",
                ["what"],
                registry=self._registry,
                buckets=_RATIOS,
            ).labels
        )

    def _make_balance(self) -> None:
        self._load_cv = Gauge(
            "remoe_layer_load_cv",
            "Variation of a layer's expert loads, with one replica each and with the scaler's",
            ["layer", "replicas"],
            registry=self._registry,
        )
        self._overlap = Gauge(
            "remoe_layer_load_overlap",
            "Share of a layer's routes that were foretold in flight",
            ["layer"],
            registry=self._registry,
        )
        self._wanted_replicas = Gauge(
            "remoe_function_wanted_replicas",
            "Replicas that the policy asks for, 0 where the function may sleep",
            ["function"],
            registry=self._registry,
        )
        self._attached = self._gauge(
            "remoe_attached_experts", "Experts in the main function beyond the plan, by load"
        )

    def _observe_balance(self, report: BalanceReport) -> None:
        for layer, (one, scaled) in enumerate(zip(report.layer_cv, report.scaled_cv, strict=True)):
            self._load_cv.labels(str(layer), "one").set(one)
            self._load_cv.labels(str(layer), "scaled").set(scaled)
        for layer, overlap in enumerate(report.overlap):
            if overlap is not None:
                self._overlap.labels(str(layer)).set(overlap)
        self._wanted_replicas.clear()  # a function that is not wished for has none
        for function, count in report.replicas.items():
            self._wanted_replicas.labels(function).set(count)
        self._attached.set(report.attached)

    def _make_money(self) -> None:
        self._cost = self._counter(
            "remoe_cost_usd", "Cost of finished requests by the price book", "part"
        )
        self._memory = self._counter(
            "remoe_gb_seconds", "Memory held times seconds busy, of finished requests", "part"
        )
        self._resident_memory = self._plain(
            "remoe_resident_gb_seconds", "Finished requests' shares of all memory held"
        )
        self._resident_cost = self._plain(
            "remoe_resident_cost_usd", "Finished requests' shares of all memory held, priced"
        )

    def _make_state(self) -> None:
        self._open = self._gauge("remoe_open_requests", "Requests being answered")
        self._ledger_pending = self._gauge("remoe_ledger_pending_rows", "Rows not written yet")
        self._ledger_failing = self._gauge(
            "remoe_ledger_failing", "1 while the ledger cannot be written"
        )
        self._ledger_lost = self._gauge("remoe_ledger_lost_rows", "Rows given up since the start")
        self._replicas = Gauge(
            "remoe_function_replicas",
            "Replicas of a function, as the local runtime tells",
            ["function", "state"],
            registry=self._registry,
        )
        self._function_memory = Gauge(
            "remoe_function_memory_bytes",
            "Anonymous memory that a function's replicas hold",
            ["function"],
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, text, registry=self._registry, buckets=buckets)

    def _counter(self, name: str, text: str, label: str) -> Callable[[str], Counter]:
        """One counter for each value of the label."""
        return cache(Counter(name, text, [label], registry=self._registry).labels)

    def _plain(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)

    def observe(self, event: RequestFinished) -> None:
        trace = event.trace
        self._requests(trace.route, str(trace.status)).inc()
        if trace.error_code is not None:
            self._errors(trace.error_code).inc()
        receipt = trace.receipt
        if receipt is None:
            return
        self._tokens("prompt").inc(trace.prompt_tokens)
        self._tokens("completion").inc(trace.completion_tokens)
        self._plans(receipt.plan).inc()
        self._observe_latencies(trace, receipt)
        self._observe_experts(trace, receipt)
        self._observe_money(receipt)

    def _observe_latencies(self, trace: Trace, receipt: Receipt) -> None:
        for histogram, value_ms in (
            (self._ttft, receipt.ttft_ms),
            (self._tpot, receipt.tpot_ms),
            (self._queue, receipt.queue_ms),
            (self._overhead, receipt.gateway_ms),
            (self._e2e, receipt.total_ms if receipt.ttft_ms is not None else None),
        ):
            if value_ms is not None:
                histogram.observe(value_ms / 1e3)
        for record in trace.records:
            self._itl.observe_many(record.gaps_s)
        for function, cold_ms in (
            ("main", receipt.cold_start.main_ms),
            ("experts", receipt.cold_start.experts_ms),
        ):
            if cold_ms > 0:
                self._cold_starts(function).observe(cold_ms / 1e3)

        cold = receipt.cold_start
        for phase, phase_ms in (
            ("activation", cold.activation_ms),
            ("boot", cold.boot_ms),
            ("load", cold.load_ms),
        ):
            if phase_ms > 0:
                self._cold_phases(phase).observe(phase_ms / 1e3)

    def _observe_experts(self, trace: Trace, receipt: Receipt) -> None:
        self._remote_calls.inc(receipt.remote_calls)
        self._remote_bytes.inc(receipt.remote_bytes)
        self._retries.inc(receipt.remote_retries)
        self._hedges.inc(receipt.remote_hedges)
        self._fallbacks.inc(receipt.local_fallbacks)
        predicted = receipt.predicted
        for kind, rate in (("predicted", predicted.hit_rate), ("actual", receipt.hit_rate)):
            if rate is not None:
                self._hit_rate(kind).observe(rate)
        stats = trace.records[0].stats if trace.records else None
        if trace.plan is not None and stats is not None:
            error = activation_error(trace.plan, stats)
            if error is not None:
                self._activation_error.observe(error)
        if stats is not None and stats.balance is not None:
            self._observe_balance(stats.balance)
        # A plan speaks of warm functions.
        warm_ttft_ms = None if receipt.ttft_ms is None else receipt.ttft_ms - receipt.cold_start_ms
        for what, actual, expected in (
            ("ttft", warm_ttft_ms, predicted.ttft_ms),
            ("tpot", receipt.tpot_ms, predicted.tpot_ms),
            ("cost", receipt.cost_usd, predicted.cost_usd),
        ):
            if actual is not None and expected:
                self._ratios(what).observe(max(0.0, actual) / expected)

    def _observe_money(self, receipt: Receipt) -> None:
        if receipt.cost is not None:
            self._cost("main_gpu").inc(receipt.cost.main_gpu_usd)
            self._cost("main_cpu").inc(receipt.cost.main_cpu_usd)
            self._cost("remote").inc(receipt.cost.remote_usd)
        for part, amount in (
            ("main_gpu", receipt.main_gpu_gb_s),
            ("main_cpu", receipt.main_cpu_gb_s),
            ("remote", receipt.remote_gb_s),
        ):
            if amount is not None:
                self._memory(part).inc(amount)
        if receipt.resident is not None:
            self._resident_memory.inc(max(0.0, receipt.resident.gb_s))
            self._resident_cost.inc(max(0.0, receipt.resident.cost_usd or 0.0))

    def render(self) -> bytes:
        """The metrics page, in Prometheus' text format."""
        self._open.set(self._resident.requests)
        writer = self._books.writer
        if writer is not None:
            self._ledger_pending.set(writer.pending)
            self._ledger_failing.set(writer.failing)
            self._ledger_lost.set(writer.lost)
        for function in self._watch.latest.functions if self._watch.latest else ():
            self._function_memory.labels(function.name).set(function.memory_bytes)
            for state in _REPLICA_STATES:
                count = sum(replica.state == state for replica in function.replicas)
                self._replicas.labels(function.name, state).set(count)
        return generate_latest(self._registry)
