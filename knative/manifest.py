"""Render a function as a Knative Service, kept as plain data for the API client and for YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knative.policy import PROGRESS_DEADLINE
from knative.spec import FunctionSpec
from remoe.quantities import cpu_quantity, memory_quantity

__all__ = ["PART_OF", "RESTRICTED", "Json", "Object", "PodSettings", "service_manifest"]

# Kubernetes objects as its API and YAML take them; a schema checks their types, not ours.
Json = Any
Object = dict[str, Any]

PART_OF = {"app.kubernetes.io/part-of": "remoe"}
# What the restricted Pod Security Standard asks of a container. Knative takes all of it without a
# feature flag, because none of it is set on the pod.
RESTRICTED: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_PORT = 8080


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSettings:
    """What a function's pods need of a cluster besides what every runtime knows of the function.

    `env` overrides the function's; `secret_env` maps a variable to a Secret's name and key.
    `cpu_request` in cores is what the scheduler reserves, the limit if not given; `extended` are
    limits such as `nvidia.com/gpu`. `start_up_s` is how long a start may take before the kubelet
    gives up on it, `response_start_s` how long a caller waits for the first byte, its cold start
    included; each has a default that follows from the function.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    volumes: Sequence[Json] = ()
    mounts: Sequence[Json] = ()
    init_containers: Sequence[Json] = ()
    service_account: str | None = None
    cpu_request: float | None = None
    extended: Mapping[str, int] = field(default_factory=dict)
    start_up_s: int | None = None
    response_start_s: int | None = None
    pull_policy: str | None = None
    restricted: bool = False


def service_manifest(spec: FunctionSpec, *, image: str, pod: PodSettings | None = None) -> Object:
    """The Service for `serving.knative.dev/v1`; all but public functions stay in the cluster."""
    pod = pod or PodSettings()
    labels: Object = {"app.kubernetes.io/name": spec.name, **PART_OF}
    if not spec.public:
        labels["networking.knative.dev/visibility"] = "cluster-local"
    annotations: Object = {PROGRESS_DEADLINE: f"{_progress_deadline_s(spec, pod)}s"}
    annotations.update(spec.annotations)
    # Counted from the request's arrival, so it must allow for a cold start.
    response_start_s = min(spec.timeout_s, pod.response_start_s or spec.timeout_s)
    template: Object = {
        "containerConcurrency": spec.container_concurrency,
        "timeoutSeconds": spec.timeout_s,
        "responseStartTimeoutSeconds": response_start_s,
        "containers": [_container(spec, image, pod)],
    }
    if pod.service_account:
        template["serviceAccountName"] = pod.service_account
        template["enableServiceLinks"] = False
    if pod.volumes:
        template["volumes"] = pod.volumes
    if pod.init_containers:
        template["initContainers"] = pod.init_containers
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": spec.name, "labels": labels},
        "spec": {
            "template": {
                "metadata": {"annotations": dict(sorted(annotations.items()))},
                "spec": template,
            }
        },
    }


def _progress_deadline_s(spec: FunctionSpec, pod: PodSettings) -> int:
    """A start must be over before Knative calls the Revision failed, with time to pull images."""
    deadline_s = int(spec.policy().progress_deadline_s)
    return max(deadline_s, (pod.start_up_s or 0) + 60)


def _container(spec: FunctionSpec, image: str, pod: PodSettings) -> Object:
    limits: Object = {
        "cpu": cpu_quantity(spec.cpu),
        "memory": memory_quantity(spec.memory_mib),
        **{name: str(count) for name, count in pod.extended.items()},
    }
    requests = dict(limits)
    if pod.cpu_request is not None:
        requests["cpu"] = cpu_quantity(min(pod.cpu_request, spec.cpu))
    probe: Object = {"httpGet": {"path": "/readyz", "port": _PORT}}
    # A heavy loader is given all of its progress deadline, less a margin, before it is restarted.
    start_up_s = pod.start_up_s or max(1, int(spec.policy().progress_deadline_s) - 10)
    container: Object = {
        "image": image,
        "command": ["python", "-m", spec.module],
        "env": _environment(spec, pod),
        "ports": [{"name": "http1", "containerPort": _PORT}],
        "resources": {"requests": requests, "limits": limits},
        "readinessProbe": probe,
        "startupProbe": {**probe, "periodSeconds": 1, "failureThreshold": start_up_s},
    }
    if pod.pull_policy:
        container["imagePullPolicy"] = pod.pull_policy
    if pod.mounts:
        container["volumeMounts"] = pod.mounts
    if pod.restricted:
        container["securityContext"] = RESTRICTED
    return container


def _environment(spec: FunctionSpec, pod: PodSettings) -> list[Json]:
    plain: Object = {
        name: {"name": name, "value": value} for name, value in {**spec.env, **pod.env}.items()
    }
    for name, (secret, key) in pod.secret_env.items():
        source: Json = {"secretKeyRef": {"name": secret, "key": key}}
        plain[name] = {"name": name, "valueFrom": source}
    return [plain[name] for name in sorted(plain)]
