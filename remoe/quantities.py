"""Amounts as Kubernetes writes them: `500m` cores, `1536Mi`."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

__all__ = ["cpu_quantity", "memory_quantity", "parse_quantity"]

_FACTORS = {
    "": Decimal(1),
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    **{prefix: Decimal(1000) ** (power + 1) for power, prefix in enumerate("kMGTPE")},
    **{f"{prefix}i": Decimal(1024) ** (power + 1) for power, prefix in enumerate("KMGTPE")},
}
_QUANTITY = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)")


def cpu_quantity(cores: float) -> str:
    """Whole cores, or thousandths, at least one of them."""
    return f"{cores:g}" if cores == int(cores) else f"{max(1, round(cores * 1000))}m"


def memory_quantity(mib: int) -> str:
    """In the largest unit that it is a whole number of, as the API server would write it."""
    for unit in ("Mi", "Gi", "Ti"):  # noqa: B007
        if mib % 1024:
            break
        mib //= 1024
    else:
        unit = "Pi"
    return f"{mib}{unit}"


def parse_quantity(text: str | float) -> float:
    """The number a quantity stands for; raises ValueError for what is none."""
    match = _QUANTITY.fullmatch(str(text))
    refusal = ValueError(f"{text!r} is not a quantity; write it like 500m, 2 or 1536Mi")
    if match is None or match[2] not in _FACTORS:
        raise refusal
    try:
        return float(Decimal(match[1]) * _FACTORS[match[2]])
    except InvalidOperation:
        raise refusal from None
