"""`x_remoe` as the load generator reads it: every field may be missing, new ones are passed over."""

from __future__ import annotations

import msgspec

__all__ = ["ColdStart", "Predicted", "Receipt", "Resident"]


class ColdStart(msgspec.Struct, frozen=True, omit_defaults=True):
    main_ms: float = 0.0
    experts_ms: float = 0.0


class Predicted(msgspec.Struct, frozen=True, omit_defaults=True):
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    cost_usd: float | None = None
    hit_rate: float | None = None


class Resident(msgspec.Struct, frozen=True, omit_defaults=True):
    """The request's share of all memory held while it was there."""

    gb_s: float = 0.0
    cost_usd: float | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fields that are measured by; see docs/api.md for what each means."""

    plan_id: str | None = None
    plan: str | None = None
    deployment_plan_id: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    queue_ms: float | None = None
    gateway_ms: float | None = None
    cold_start_ms: float = 0.0
    cold_start: ColdStart = ColdStart()
    remote_calls: int = 0
    remote_bytes: int = 0
    remote_retries: int = 0
    local_fallbacks: int = 0
    hit_rate: float | None = None
    main_gb_s: float | None = None
    main_gpu_gb_s: float | None = None
    main_cpu_gb_s: float | None = None
    remote_gb_s: float | None = None
    cost_usd: float | None = None
    resident: Resident | None = None
    price_book: str | None = None
    predicted: Predicted | None = None
