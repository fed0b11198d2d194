"""What a request's span says, in OpenTelemetry's words for generative AI and in ours."""

from __future__ import annotations

from gateway.events import Trace
from remoe.tracing import Attributes, Span

__all__ = ["describe_request"]

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}


def describe_request(span: Span, trace: Trace) -> None:
    """Name the span and set its attributes, once the request is over."""
    operation = _OPERATIONS.get(trace.route)
    attributes: dict[str, str | int | float | bool | None] = {
        "http.route": trace.route,
        "http.response.status_code": trace.status or None,
        "remoe.request_id": trace.request_id,
    }
    if operation is not None and trace.model is not None:
        span.rename(f"{operation} {trace.model}")
        attributes |= _generation(operation, trace)
    span.set(attributes)
    if trace.error_code is not None:
        span.fail(trace.error_code)


def _generation(operation: str, trace: Trace) -> Attributes:
    attributes: dict[str, str | int | float | bool | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "remoe",
        "gen_ai.request.model": trace.model,
        "gen_ai.response.model": trace.model,
        "gen_ai.response.id": trace.reply_id,
        "gen_ai.usage.input_tokens": trace.prompt_tokens,
        "gen_ai.usage.output_tokens": trace.completion_tokens,
    }
    receipt = trace.receipt
    if receipt is not None:
        attributes |= {
            "remoe.plan_id": receipt.plan_id,
            "remoe.ttft_ms": receipt.ttft_ms,
            "remoe.cold_start_ms": receipt.cold_start_ms,
            "remoe.remote_calls": receipt.remote_calls,
            "remoe.local_fallbacks": receipt.local_fallbacks,
            "remoe.hit_rate": receipt.hit_rate,
            "remoe.cost_usd": receipt.cost_usd,
        }
    return attributes
