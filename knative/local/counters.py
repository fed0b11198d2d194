"""What happened to a function since `remoe up`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters"]


@dataclass(slots=True)
class Counters:
    """A cold start is a start from zero for a waiting request: milliseconds from spawn to ready."""

    cold_starts: int = 0
    cold_start_last_ms: float | None = None
    cold_start_total_ms: float = 0.0
    crashes: int = 0
    restarts: int = 0
    memory_kills: int = 0
    refused: int = 0
    requests: int = 0
    last_call_at: float | None = None

    def add_cold_start(self, duration_ms: float) -> None:
        self.cold_starts += 1
        self.cold_start_last_ms = duration_ms
        self.cold_start_total_ms += duration_ms
