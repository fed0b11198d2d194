"""What `remoe status` is told, as JSON over the control socket."""

from __future__ import annotations

from typing import Literal

import msgspec

from knative.local.events import Event

__all__ = ["FunctionState", "FunctionStatus", "ReplicaState", "ReplicaStatus", "RuntimeStatus"]

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
