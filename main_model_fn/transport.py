"""The seam to expert functions: send a call, do something else, read the reply.

Sending and reading are apart so that all calls of a layer leave before local experts compute,
without an event loop in the forward pass (docs/adr/0002-expert-protocol.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from remoe.expert_call import ExpertCall

__all__ = ["ExpertTransport", "PendingReply", "RemoteResult"]


@dataclass(frozen=True, slots=True)
class RemoteResult:
    """`partial` is float32 [rows, hidden] as bytes; `cold_start_s` is what this call waited."""

    partial: bytes
    busy_s: float
    cold_start_s: float
    retries: int
    bytes_moved: int


class PendingReply(Protocol):
    def result(self) -> RemoteResult:
        """Wait for the reply; raises ExpertUnavailableError once retries are spent."""
        ...


class ExpertTransport(Protocol):
    def send(self, call: ExpertCall) -> PendingReply:
        """Send at once and return without waiting; never raises for network trouble."""
        ...

    def close(self) -> None: ...
