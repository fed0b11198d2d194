"""Apply a release, wait for it, go back to an earlier one, and remove it all.

The token of expert calls is made here, once, and never leaves the cluster.
"""

from __future__ import annotations

import secrets
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from knative.cluster.api import Cluster, ClusterError
from knative.cluster.release import HASH
from knative.cluster.releases import Expectation, keep
from knative.cluster.security import TOKEN_KEY, TOKEN_SECRET
from knative.manifest import PART_OF, Object

__all__ = ["Applied", "apply_release", "destroy", "not_ready", "wait_gone", "wait_ready"]

Outcome = Literal["created", "changed", "unchanged", "removed"]
_KNATIVE = "serving.knative.dev/v1"
# In this order: who depends on the others goes first.
_KINDS = (
    (_KNATIVE, "Service"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("v1", "ServiceAccount"),
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
)


@dataclass(frozen=True, slots=True)
class Applied:
    kind: str
    name: str
    outcome: Outcome


def apply_release(
    cluster: Cluster,
    objects: Sequence[Object],
    *,
    namespace: str,
    expectation: Expectation | None = None,
    dry_run: bool = False,
) -> Iterator[Applied]:
    """Apply what differs, one by one; Services of functions that are no more go last.

    A dry run is the server's own: webhooks and quotas have their say, and nothing is kept. Raises
    ConflictError where somebody else owns a field, before anything after it is applied.
    """
    if not dry_run:
        _ensure_token(cluster, namespace)
    pretended: set[str] = set()
    for one in objects:
        applied = _apply(cluster, _with_real_account(one, pretended), dry_run=dry_run)
        if dry_run and (applied.kind, applied.outcome) == ("ServiceAccount", "created"):
            pretended.add(applied.name)
        yield applied
    wanted = {(one["kind"], one["metadata"]["name"]) for one in objects}
    for kind in ("Service", "NetworkPolicy"):
        version = _KNATIVE if kind == "Service" else "networking.k8s.io/v1"
        for old in cluster.list(version, kind, namespace, PART_OF):
            name = old["metadata"]["name"]
            if (kind, name) not in wanted:
                if not dry_run:
                    cluster.delete(old)
                yield Applied(kind, name, "removed")
    if not dry_run:
        keep(cluster, objects, namespace, expectation)


def _with_real_account(one: Object, pretended: set[str]) -> Object:
    """A Service that names no account of a dry run: its webhook tries a pod, which needs one."""
    if one["kind"] != "Service":
        return one
    template = one["spec"]["template"]
    if template["spec"].get("serviceAccountName") not in pretended:
        return one
    pod = {name: value for name, value in template["spec"].items() if name != "serviceAccountName"}
    return {**one, "spec": {**one["spec"], "template": {**template, "spec": pod}}}


def _apply(cluster: Cluster, one: Object, *, dry_run: bool) -> Applied:
    metadata = one["metadata"]
    kind, name = one["kind"], metadata["name"]
    now = cluster.get(one["apiVersion"], kind, name, metadata["namespace"])
    if now is not None and _same(now, one):
        return Applied(kind, name, "unchanged")
    after = cluster.apply(one, dry_run=dry_run)
    if now is None:
        return Applied(kind, name, "created")
    version = "resourceVersion"
    if not dry_run and after["metadata"].get(version) == now["metadata"].get(version):
        return Applied(kind, name, "unchanged")
    return Applied(kind, name, "changed")


def _same(now: Object, wanted: Object) -> bool:
    """Whether the cluster has this very Service: its digest, untouched by others since.

    The digest says what was applied last; a field that somebody else changed since shows in the
    comparison with what we own. Other kinds are applied each time, which changes nothing if
    nothing differs.
    """
    annotations = now["metadata"].get("annotations", {})
    mine = wanted["metadata"].get("annotations", {}).get(HASH)
    return mine is not None and annotations.get(HASH) == mine and contains(now, wanted)


def contains(now: object, wanted: object) -> bool:
    """Whether `now` has everything of `wanted`; what the cluster added besides does not count."""
    if isinstance(wanted, dict):
        return isinstance(now, dict) and all(
            contains(now.get(key), value) for key, value in wanted.items() if value != {}
        )
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(now, list)
            and len(now) == len(wanted)
            and all(contains(a, b) for a, b in zip(now, wanted, strict=True))
        )
    return now == wanted


def _ensure_token(cluster: Cluster, namespace: str) -> None:
    if cluster.get("v1", "Secret", TOKEN_SECRET, namespace) is None:
        token = secrets.token_urlsafe(32)
        cluster.create(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": TOKEN_SECRET, "namespace": namespace, "labels": PART_OF},
                "type": "Opaque",
                "immutable": True,
                "data": {TOKEN_KEY: b64encode(token.encode()).decode()},
            }
        )


def not_ready(service: Object) -> str | None:
    """Why a Service is not ready; None if it is. Raises ClusterError if it will not become so."""
    metadata, status = service["metadata"], service.get("status", {})
    if status.get("observedGeneration") != metadata.get("generation"):
        return "waits for Knative to look at it"
    for condition in status.get("conditions", []):
        if condition["type"] == "Ready":
            if condition["status"] == "True":
                return None
            reason = ": ".join(
                part for part in (condition.get("reason"), condition.get("message")) if part
            )
            if condition["status"] == "False":
                raise ClusterError(f"{metadata['name']} failed: {reason}")
            return reason or "is being made"
    return "is being made"


def wait_ready(
    cluster: Cluster,
    names: Sequence[str],
    namespace: str,
    *,
    timeout_s: float,
    on_ready: Callable[[str, float], None] = lambda name, after_s: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when all are ready; a function at zero is. Raises ClusterError with the reasons."""
    began = clock()
    waiting = list(names)
    while waiting:
        reasons = {}
        for service in cluster.list(_KNATIVE, "Service", namespace, PART_OF):
            name = service["metadata"]["name"]
            if name in waiting:
                reasons[name] = not_ready(service)
                if reasons[name] is None:
                    waiting.remove(name)
                    on_ready(name, clock() - began)
        if not waiting:
            return
        if clock() - began > timeout_s:
            told = "; ".join(f"{name}: {reasons.get(name, 'is not there')}" for name in waiting)
            raise ClusterError(f"not ready after {timeout_s:.0f} s: {told}")
        sleep(0.5)


def destroy(cluster: Cluster, namespace: str) -> Iterator[Applied]:
    """Delete everything that was made here; claims, and Secrets of the operator's, stay."""
    for version, kind in _KINDS:
        for one in cluster.list(version, kind, namespace, PART_OF):
            if cluster.delete(one):
                yield Applied(kind, one["metadata"]["name"], "removed")


def wait_gone(
    cluster: Cluster,
    namespace: str,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when no object and no pod is left; raises ClusterError with what is."""
    began = clock()
    while True:
        left = [
            f"{kind} {one['metadata']['name']}"
            for version, kind in (*_KINDS, ("v1", "Pod"))
            for one in cluster.list(version, kind, namespace, PART_OF)
        ]
        if not left:
            return
        if clock() - began > timeout_s:
            raise ClusterError(f"still there after {timeout_s:.0f} s: {', '.join(left)}")
        sleep(0.5)
