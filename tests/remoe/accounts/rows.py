"""Ledger rows for tests."""

from __future__ import annotations

from remoe.accounts.entries import Entry

__all__ = ["entry"]


def entry(name: str = "chatcmpl-1", **changes: object) -> Entry:
    """A finished request; amounts add up unless a test changes them."""
    values: dict[str, object] = {
        "id": name,
        "request_id": f"request-of-{name}",
        "finished_at_us": 1_764_000_000_000_000,
        "day": "2025-11-24",
        "key_id": "-",
        "model": "tiny",
        "outcome": "finished",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "plan_id": "plan-1",
        "deployment_plan_id": None,
        "price_book": "alibaba-fc",
        "metered": True,
        "main_gpu_kb_s": 1,
        "main_cpu_kb_s": 2,
        "remote_kb_s": 3,
        "main_gpu_nano_usd": 4,
        "main_cpu_nano_usd": 5,
        "remote_nano_usd": 6,
        "total_nano_usd": 15,
        "resident_kb_s": None,
        "resident_starting_kb_s": None,
        "resident_nano_usd": None,
        "remote_calls": 7,
        "remote_bytes": 8,
        "local_fallbacks": 0,
        "ttft_us": 9,
        "tpot_us": None,
        "total_us": 10,
        "main_cold_start_us": 0,
        "experts_cold_start_us": 0,
        "predicted_ttft_us": None,
        "predicted_tpot_us": None,
        "predicted_nano_usd": None,
    }
    return Entry(**{**values, **changes})  # type: ignore[arg-type]
