"""Price books: what a GB·s of memory costs, from dated public lists."""

from __future__ import annotations

import msgspec

__all__ = ["DEFAULT_PRICES", "PriceBook"]


class PriceBook(msgspec.Struct, frozen=True, kw_only=True):
    """Unit prices of Remoe's cost model (A.4): c^c and c^g, in USD per GB·s (1 GB = 1e9 bytes)."""

    name: str
    source: str
    as_of: str
    cpu_usd_per_gb_s: float
    gpu_usd_per_gb_s: float


# One vCPU-GB second of Alibaba Function Compute costs 1 + 0.15 CU, one active Tesla-class GPU-GB
# second 2.1 CU, at $0.000020 per CU: the only public list with both prices, as the paper needs.
DEFAULT_PRICES = PriceBook(
    name="alibaba-fc-payg",
    source="Alibaba Cloud Function Compute, pay as you go, first tier (CU factors 1, 0.15, 2.1)",
    as_of="2026-11",
    cpu_usd_per_gb_s=2.3e-5,
    gpu_usd_per_gb_s=4.2e-5,
)
