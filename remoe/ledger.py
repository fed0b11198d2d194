"""What a request really used, and what that costs."""

from __future__ import annotations

import msgspec

from remoe.prices import PriceBook

__all__ = ["Cost", "Ledger"]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """A bill in USD, split by where the money went."""

    main_gpu_usd: float
    main_cpu_usd: float
    remote_usd: float

    @property
    def total_usd(self) -> float:
        return self.main_gpu_usd + self.main_cpu_usd + self.remote_usd


class Ledger(msgspec.Struct, kw_only=True):
    """The busy ledger of one request, by Remoe's formula: memory held x time busy (A.4).

    The main function's memory is billed for every second the request is in it, shared equally
    among the requests of the same engine step; an expert function's only while it computes.
    Cold starts are reported, not billed, as in equations (6) to (9).
    """

    main_gpu_gb_s: float = 0.0
    main_cpu_gb_s: float = 0.0
    remote_gb_s: float = 0.0
    remote_calls: int = 0
    remote_rows: int = 0
    remote_bytes: int = 0
    remote_cold_start_s: float = 0.0
    remote_retries: int = 0
    remote_hedges: int = 0
    local_fallbacks: int = 0

    def cost(self, prices: PriceBook) -> Cost:
        """Price it; what ran on a GPU counts nothing where the book has no price for GPUs."""
        return Cost(
            main_gpu_usd=self.main_gpu_gb_s * (prices.gpu_usd_per_gb_s or 0.0),
            main_cpu_usd=self.main_cpu_gb_s * prices.cpu_usd_per_gb_s,
            remote_usd=self.remote_gb_s * prices.cpu_usd_per_gb_s,
        )
