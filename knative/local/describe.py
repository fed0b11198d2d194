"""A function's state, as `remoe status` shows it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from knative.local.backoff import Backoff
from knative.local.counters import Counters
from knative.local.replica import Replica
from knative.spec import FunctionSpec
from remoe.runtime_status import FunctionState, FunctionStatus, ReplicaState

__all__ = ["describe_function"]


def describe_function(
    spec: FunctionSpec,
    *,
    url: str,
    desired: int,
    replicas: Sequence[Replica],
    counters: Counters,
    backoff: Backoff,
) -> FunctionStatus:
    """Sum up the replicas and say in one word what the function is doing."""
    states = {replica.state for replica in replicas}
    backing_off = backoff.waiting and desired > 0 and not states & {"ready", "starting"}
    in_flight = sum(replica.in_flight for replica in replicas)
    last_call_s = None
    if in_flight:
        last_call_s = 0.0
    elif counters.last_call_at is not None:
        last_call_s = time.monotonic() - counters.last_call_at
    if backing_off:
        detail = f"{backoff.reason}; next try in {backoff.remaining_s:.0f} s"
    else:
        detail = next((replica.detail for replica in replicas if replica.detail), "")
    return FunctionStatus(
        name=spec.name,
        holds=spec.holds,
        url=url,
        state="backing off" if backing_off else _state(states),
        detail=detail,
        desired=desired,
        ready=sum(replica.state == "ready" for replica in replicas),
        in_flight=in_flight,
        requests=counters.requests,
        last_call_s=last_call_s,
        memory_bytes=sum(replica.memory_bytes for replica in replicas),
        mapped_bytes=sum(replica.mapped_bytes for replica in replicas),
        memory_limit_bytes=spec.memory_mib << 20,
        cold_starts=counters.cold_starts,
        cold_start_last_ms=counters.cold_start_last_ms,
        cold_start_total_ms=counters.cold_start_total_ms,
        crashes=counters.crashes,
        restarts=counters.restarts,
        memory_kills=counters.memory_kills,
        refused=counters.refused,
        replicas=[replica.status() for replica in replicas],
    )


def _state(states: AbstractSet[ReplicaState]) -> FunctionState:
    if "ready" in states:
        return "ready"
    if "starting" in states:
        return "starting"
    return "draining" if states else "zero"
