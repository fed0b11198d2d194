"""What a runtime says of its functions: the answer to `remoe status`, and what the gateway watches.

The local supervisor sends it as JSON over its control socket, whose path is in
REMOE_RUNTIME_CONTROL: `status` once, `watch` as a line whenever something changes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "Event",
    "EventKind",
    "FunctionState",
    "FunctionStatus",
    "ReplicaState",
    "ReplicaStatus",
    "RuntimeStatus",
]

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


ReplicaState = Literal["starting", "ready", "draining"]
FunctionState = Literal["zero", "starting", "ready", "draining", "backing off"]


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`memory_bytes` is anonymous memory, which the limit counts; `mapped_bytes` is file pages,
    such as the checkpoint's, which replicas share and the kernel may drop."""

    name: str
    pid: int
    state: ReplicaState
    age_s: float
    in_flight: int
    memory_bytes: int
    mapped_bytes: int


class FunctionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Counters are since `remoe up`. `detail` explains a state that needs it."""

    name: str
    holds: str
    url: str
    state: FunctionState
    detail: str
    desired: int
    ready: int
    in_flight: int
    requests: int
    last_call_s: float | None
    memory_bytes: int
    mapped_bytes: int
    memory_limit_bytes: int
    cold_starts: int
    cold_start_last_ms: float | None
    cold_start_total_ms: float
    crashes: int
    restarts: int
    memory_kills: int
    refused: int
    replicas: list[ReplicaStatus]


class RuntimeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`events` are the latest, oldest first."""

    pid: int
    url: str
    model: str
    up_s: float
    functions: list[FunctionStatus]
    events: list[Event]
