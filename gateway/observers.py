"""An adapter of the gateway's events: one JSON line a request, with its ids."""

from __future__ import annotations

import structlog

from gateway.events import RequestFinished

__all__ = ["log_request"]

_log = structlog.get_logger()
_QUIET_ROUTES = frozenset({"/", "/healthz", "/readyz", "/metrics"})


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
            "reply_id": trace.reply_id,
            "key_id": trace.key_id,
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
