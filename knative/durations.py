"""Durations as Knative writes them: `90s`, `1m30s`, `0.5h`."""

from __future__ import annotations

import re

__all__ = ["format_duration", "parse_duration"]

_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h)")


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `1m30s`; raises ValueError for anything else."""
    parts = _PART.findall(text)
    if text == "0":
        return 0.0
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration; write it like 60s, 10m or 1m30s")
    return float(sum(float(number) * _UNITS_S[unit] for number, unit in parts))


def format_duration(duration_s: float) -> str:
    """Write seconds as a duration; whole minutes and hours stay short."""
    for unit in ("h", "m"):
        count, rest = divmod(duration_s, _UNITS_S[unit])
        if count and not rest:
            return f"{count:.0f}{unit}"
    return f"{duration_s:g}s"
