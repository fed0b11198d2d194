"""A generation as spans: waiting, prefill, decoding, and each call to an expert function."""

from __future__ import annotations

import time

from main_model_fn.transport import RemoteResult
from remoe.generation import GenerationStats
from remoe.tracing import Span, current_span

__all__ = ["trace_call", "trace_generation"]


def trace_generation(stats: GenerationStats) -> None:
    """Add the phases to the request's span, now that it is over; cheap when nothing is traced."""
    span, ledger = current_span(), stats.ledger
    ended_s = time.time()
    began_s = ended_s - stats.total_s
    first_step_s, first_token_s = began_s + stats.queue_s, began_s + stats.first_token_s
    span.add_timed("queue", began_s=began_s, ended_s=first_step_s)
    span.add_timed(
        "prefill",
        began_s=first_step_s,
        ended_s=first_token_s,
        attributes={"gen_ai.usage.input_tokens": stats.prompt_tokens},
    )
    span.add_timed(
        "decode",
        began_s=first_token_s,
        ended_s=ended_s,
        attributes={"gen_ai.usage.output_tokens": stats.output_tokens},
    )
    span.set(
        {
            "remoe.deployment_plan_id": stats.deployment_plan_id,
            "remoe.remote.calls": ledger.remote_calls,
            "remoe.remote.rows": ledger.remote_rows,
            "remoe.remote.bytes": ledger.remote_bytes,
            "remoe.remote.busy_gb_s": ledger.remote_gb_s,
            "remoe.remote.cold_start_s": ledger.remote_cold_start_s,
            "remoe.remote.retries": ledger.remote_retries,
            "remoe.remote.hedges": ledger.remote_hedges,
            "remoe.local_fallbacks": ledger.local_fallbacks,
        }
    )


def trace_call(span: Span, result: RemoteResult) -> None:
    """End a call's span with what its reply says. Functions export none: that would slow their start."""
    span.set(
        {
            "remoe.remote.replica": result.replica,
            "remoe.remote.bytes": result.bytes_moved,
            "remoe.remote.busy_s": result.busy_s,
            "remoe.remote.cold_start_s": result.cold_start_s,
            "remoe.remote.retries": result.retries,
            "remoe.remote.hedges": result.hedges,
        }
    )
    span.end()
