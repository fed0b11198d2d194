"""Notable things that happen to functions, for people and for counters."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Event", "EventKind"]

EventKind = Literal[
    "ready",
    "cold_start",
    "scaled_out",
    "scaled_in",
    "scaled_to_zero",
    "crash",
    "restart",
    "memory_kill",
    "refusing",
]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`at` is Unix time; `text` is one line that stands alone."""

    at: float
    kind: EventKind
    function: str
    replica: str | None
    text: str
