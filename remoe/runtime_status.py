"""What a runtime says of its functions: the answer to `remoe status`, and what the gateway watches.

The local supervisor sends it as JSON over its control socket, whose path is in
REMOE_RUNTIME_CONTROL: `status` once, `watch` as a line whenever something changes. Functions may
ask there for replicas, too (`scale_line`).
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
    "parse_scale_line",
    "scale_line",
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


def scale_line(function: str, replicas: int, *, for_s: float) -> bytes:
    """The wish for at least so many replicas for a while, or with 0 for none until a call comes."""
    return f"scale {function} {replicas} {for_s:g}\n".encode()


def parse_scale_line(line: bytes) -> tuple[str, int, float] | None:
    """The function, replicas and seconds of such a wish; None if the line is none."""
    words = line.decode(errors="replace").split()
    if len(words) != 4 or words[0] != "scale":  # the words of `scale_line`
        return None
    try:
        replicas, for_s = int(words[2]), float(words[3])
    except ValueError:
        return None
    return (words[1], replicas, for_s) if replicas >= 0 and 0 < for_s < float("inf") else None
