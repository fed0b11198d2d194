"""Whole nano-dollars, so that sums of bills are exact (docs/adr/0010-exact-durable-ledger.md).

What a request used is first rounded to whole kB·s (a millionth of a GB·s), and those are priced:
anybody can check a bill from the quantities beside it.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal

import msgspec

from remoe.ledger import Ledger
from remoe.prices import PriceBook

__all__ = ["Charge", "Usage", "gb_s", "kb_s", "price", "usd"]

_KB_S_PER_GB_S = 1_000_000
_NANO = 1_000_000_000


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Memory held times seconds busy, in whole kB·s, by where."""

    main_gpu_kb_s: int
    main_cpu_kb_s: int
    remote_kb_s: int

    @classmethod
    def of(cls, ledger: Ledger) -> Usage:
        return cls(
            main_gpu_kb_s=kb_s(ledger.main_gpu_gb_s),
            main_cpu_kb_s=kb_s(ledger.main_cpu_gb_s),
            remote_kb_s=kb_s(ledger.remote_gb_s),
        )


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """A bill in whole nano-dollars; the total is the sum of its rounded parts."""

    main_gpu_nano_usd: int
    main_cpu_nano_usd: int
    remote_nano_usd: int

    @property
    def total_nano_usd(self) -> int:
        return self.main_gpu_nano_usd + self.main_cpu_nano_usd + self.remote_nano_usd

    @classmethod
    def of(cls, usage: Usage, prices: PriceBook) -> Charge | None:
        """Price what was used; None if a GPU was used and the price book has no price for it."""
        gpu = prices.gpu_usd_per_gb_s
        if gpu is None and usage.main_gpu_kb_s:
            return None
        cpu = prices.cpu_usd_per_gb_s
        return cls(
            main_gpu_nano_usd=price(usage.main_gpu_kb_s, gpu or 0.0),
            main_cpu_nano_usd=price(usage.main_cpu_kb_s, cpu),
            remote_nano_usd=price(usage.remote_kb_s, cpu),
        )


def kb_s(gigabyte_seconds: float) -> int:
    return round(gigabyte_seconds * _KB_S_PER_GB_S)


def gb_s(kilobyte_seconds: int) -> float:
    return kilobyte_seconds / _KB_S_PER_GB_S


def price(kilobyte_seconds: int, usd_per_gb_s: float) -> int:
    """Nano-dollars for an amount, at the price as it is written in the book, half to even."""
    exact = kilobyte_seconds * Decimal(repr(usd_per_gb_s)) * (_NANO // _KB_S_PER_GB_S)
    return int(exact.to_integral_value(ROUND_HALF_EVEN))


def usd(nano_usd: int) -> float:
    """Dollars for people and JSON; back to whole nano-dollars without loss below a million."""
    return nano_usd / _NANO
