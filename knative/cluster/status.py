"""What runs in a namespace, in the words of `remoe status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from knative.cluster.api import Cluster
from knative.cluster.deploying import not_ready
from knative.cluster.release import HOLDS
from knative.manifest import PART_OF, Object
from remoe.errors import NotFoundError, RemoeError
from remoe.quantities import parse_quantity
from remoe.runtime_status import (
    FunctionState,
    FunctionStatus,
    ReplicaState,
    ReplicaStatus,
    RuntimeStatus,
)

__all__ = ["namespace_status"]

_KNATIVE = "serving.knative.dev/v1"
_SERVICE_LABEL = "serving.knative.dev/service"
_CONTAINER = "user-container"
_ORDER = ("gateway", "planner", "main", "expert")


def namespace_status(cluster: Cluster, namespace: str) -> RuntimeStatus:
    """Every function and its pods; raises NotFoundError if nothing is deployed there.

    What only queue-proxies know (requests, calls in flight) and what needs a metrics server
    (memory held) is left at zero or unknown.
    """
    services = cluster.list(_KNATIVE, "Service", namespace, PART_OF)
    if not services:
        raise NotFoundError(
            f"nothing of Remoe is in namespace {namespace}; deploy with `remoe deploy`, or choose "
            "another with --namespace"
        )
    now = datetime.now(UTC)
    pods: dict[str, list[Object]] = {}
    for pod in cluster.list("v1", "Pod", namespace, PART_OF):
        name = pod["metadata"].get("labels", {}).get(_SERVICE_LABEL, "")
        pods.setdefault(name, []).append(pod)
    services.sort(key=lambda one: (_rank(one), one["metadata"]["name"]))
    gateway = services[0]
    main = next((one for one in services if _component(one) == "main"), gateway)
    return RuntimeStatus(
        pid=0,
        url=gateway.get("status", {}).get("url", ""),
        model=main["metadata"]["name"].removesuffix("-main"),
        up_s=_age_s(gateway["metadata"].get("creationTimestamp"), now),
        functions=[_function(one, pods.get(one["metadata"]["name"], []), now) for one in services],
        events=[],
    )


def _component(service: Object) -> str:
    component: str = service["metadata"].get("labels", {}).get("app.kubernetes.io/component", "")
    return component


def _rank(service: Object) -> int:
    component = _component(service)
    return _ORDER.index(component) if component in _ORDER else len(_ORDER)


def _function(service: Object, pods: Sequence[Object], now: datetime) -> FunctionStatus:
    metadata, status = service["metadata"], service.get("status", {})
    replicas = [_replica(pod, now) for pod in pods]
    ready = sum(replica.state == "ready" for replica in replicas)
    state, detail = _state([replica.state for replica in replicas]), ""
    try:
        detail = not_ready(service) or ""
    except RemoeError as error:
        state, detail = "backing off", error.message
    template = service["spec"]["template"]["spec"]
    limit = template["containers"][0].get("resources", {}).get("limits", {}).get("memory", "0")
    restarts = sum(_restarts(pod) for pod in pods)
    starts_ms = sorted(
        (one for pod in pods if (one := _cold_start_ms(pod)) is not None), key=lambda one: one[0]
    )
    return FunctionStatus(
        name=metadata["name"],
        holds=metadata.get("annotations", {}).get(HOLDS, ""),
        url=status.get("address", {}).get("url", status.get("url", "")),
        state=state,
        detail=detail,
        desired=len([replica for replica in replicas if replica.state != "draining"]),
        ready=ready,
        in_flight=0,
        requests=0,
        last_call_s=None,
        memory_bytes=0,
        mapped_bytes=0,
        memory_limit_bytes=int(parse_quantity(limit)),
        cold_starts=len(starts_ms),
        cold_start_last_ms=starts_ms[-1][1] if starts_ms else None,
        cold_start_total_ms=sum(duration for _, duration in starts_ms),
        crashes=restarts,
        restarts=restarts,
        memory_kills=sum(_memory_kills(pod) for pod in pods),
        refused=0,
        replicas=replicas,
    )


def _state(states: Sequence[ReplicaState]) -> FunctionState:
    for state in ("ready", "starting", "draining"):
        if state in states:
            return state
    return "zero"


def _replica(pod: Object, now: datetime) -> ReplicaStatus:
    metadata = pod["metadata"]
    state: ReplicaState = (
        "ready" if _condition(pod, "Ready").get("status") == "True" else "starting"
    )
    if metadata.get("deletionTimestamp"):
        state = "draining"
    return ReplicaStatus(
        name=metadata["name"],
        pid=0,
        state=state,
        age_s=_age_s(metadata.get("creationTimestamp"), now),
        in_flight=0,
        memory_bytes=0,
        mapped_bytes=0,
    )


def _condition(pod: Object, kind: str) -> Mapping[str, str]:
    conditions: Sequence[Mapping[str, str]] = pod.get("status", {}).get("conditions", [])
    return next((one for one in conditions if one["type"] == kind), {})


def _cold_start_ms(pod: Object) -> tuple[str, float] | None:
    """When the pod was made, and how long until it was ready; whole seconds, as Kubernetes says."""
    made = pod["metadata"].get("creationTimestamp")
    ready = _condition(pod, "Ready")
    since = ready.get("lastTransitionTime")
    if made is None or ready.get("status") != "True" or since is None:
        return None
    return made, 1e3 * (_time(since) - _time(made)).total_seconds()


def _restarts(pod: Object) -> int:
    return sum(
        status.get("restartCount", 0)
        for status in pod.get("status", {}).get("containerStatuses", [])
    )


def _memory_kills(pod: Object) -> int:
    return sum(
        status.get("lastState", {}).get("terminated", {}).get("reason") == "OOMKilled"
        for status in pod.get("status", {}).get("containerStatuses", [])
    )


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _age_s(text: str | None, now: datetime) -> float:
    return (now - _time(text)).total_seconds() if text else 0.0
