"""Price books: what a GB·s of memory costs, from dated public lists or a file of one's own.

A book is a JSON file that gives each number with its source; what could not be verified is left
out and named. Shipped books are in `remoe/price_books/`.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated

import msgspec

from remoe.errors import SettingsError

__all__ = ["DEFAULT_PRICES", "DEFAULT_PRICE_BOOK", "PriceBook", "load_prices", "price_book_names"]

DEFAULT_PRICE_BOOK = "alibaba-fc"
_SHIPPED = Path(__file__).parent / "price_books"
_GIB_IN_GB = Decimal(2**30) / Decimal(10**9)
# A GB·s above this many dollars is a mistake of units: public lists are around 1e-5.
_DEAREST_USD_PER_GB_S = Decimal("0.01")

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Date = Annotated[str, msgspec.Meta(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$")]


class PriceBook(msgspec.Struct, frozen=True, kw_only=True):
    """Unit prices of Remoe's cost model (A.4): c^c and c^g, in USD per GB·s (1 GB = 1e9 bytes).

    c^g is None where a platform has no GPU, or no price of one could be verified.
    """

    name: str
    source: str
    as_of: str
    cpu_usd_per_gb_s: float
    gpu_usd_per_gb_s: float | None = None


class _Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    usd: Decimal
    source: _Text


class _BookFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory with its share of CPU is priced whole, or as CPU and memory apart.

    `vcpu_per_gb` says how much CPU goes with a GB in the second case; the paper's is 1.
    """

    name: _Text
    title: _Text
    as_of: _Date
    read_on: _Date | None = None
    memory_with_cpu_per_gb_s: _Price | None = None
    vcpu_per_s: _Price | None = None
    memory_per_gb_s: _Price | None = None
    memory_per_gib_s: _Price | None = None
    vcpu_per_gb: Decimal = Decimal(1)
    gpu_memory_per_gb_s: _Price | None = None
    not_verified: list[str] = []
    notes: list[str] = []

    def cpu_usd_per_gb_s(self) -> Decimal:
        whole, vcpu = self.memory_with_cpu_per_gb_s, self.vcpu_per_s
        memory = self.memory_per_gb_s or self.memory_per_gib_s
        if whole is not None:
            if vcpu or memory:
                raise ValueError(
                    "`memory_with_cpu_per_gb_s` already has the CPU in it; give either it, or "
                    "`vcpu_per_s` and `memory_per_gb_s`"
                )
            return whole.usd
        if vcpu is None or memory is None:
            raise ValueError(
                "a book needs `memory_with_cpu_per_gb_s`, or both `vcpu_per_s` and "
                "`memory_per_gb_s` (or `memory_per_gib_s`)"
            )
        per_gb = self.memory_per_gb_s
        memory_usd = memory.usd if per_gb is not None else memory.usd / _GIB_IN_GB
        return vcpu.usd * self.vcpu_per_gb + memory_usd

    def book(self) -> PriceBook:
        """Derive and check the unit prices; raises ValueError."""
        parts = {
            field: getattr(self, field)
            for field in self.__struct_fields__
            if isinstance(getattr(self, field), _Price)
        }
        cpu, gpu = self.cpu_usd_per_gb_s(), self.gpu_memory_per_gb_s
        for name, usd in [*((field, part.usd) for field, part in parts.items()), ("sum", cpu)]:
            if not 0 < usd <= _DEAREST_USD_PER_GB_S:
                raise ValueError(
                    f"`{name}` is {usd} USD; it must be above 0 and at most "
                    f"{_DEAREST_USD_PER_GB_S} USD per second (not per hour or month)"
                )
        if self.vcpu_per_gb <= 0:
            raise ValueError("`vcpu_per_gb` must be above 0")
        return PriceBook(
            name=self.name,
            source="; ".join(dict.fromkeys(part.source for part in parts.values())),
            as_of=self.as_of,
            cpu_usd_per_gb_s=float(round(cpu, 15)),
            gpu_usd_per_gb_s=None if gpu is None else float(gpu.usd),
        )


def price_book_names() -> list[str]:
    """The shipped books."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def load_prices(name_or_path: str) -> PriceBook:
    """A shipped book by name, or a JSON file by path; raises SettingsError saying what is wrong."""
    if name_or_path in price_book_names():
        data = (_SHIPPED / f"{name_or_path}.json").read_bytes()
    else:
        try:
            data = Path(name_or_path).expanduser().read_bytes()
        except OSError as error:
            raise SettingsError(
                f"there is no price book '{name_or_path}' ({error.strerror}). Use one of "
                f"{', '.join(price_book_names())}, or the path of a JSON file."
            ) from error
    try:
        return msgspec.json.decode(data, type=_BookFile).book()
    except (msgspec.DecodeError, ValueError) as error:
        raise SettingsError(f"the price book {name_or_path} cannot be used: {error}") from error


DEFAULT_PRICES = load_prices(DEFAULT_PRICE_BOOK)
