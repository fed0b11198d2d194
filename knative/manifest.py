"""Render a function as a Knative Service, kept as plain data for the API client and for YAML."""

from __future__ import annotations

from collections.abc import Mapping

from knative.policy import PROGRESS_DEADLINE
from knative.spec import FunctionSpec

__all__ = ["Json", "service_manifest"]

Json = Mapping[str, "Json"] | list["Json"] | str | int

_PORT = 8080


def service_manifest(spec: FunctionSpec, *, image: str) -> dict[str, Json]:
    """The Service for `serving.knative.dev/v1`; all but public functions stay in the cluster."""
    policy = spec.policy()
    labels: dict[str, Json] = {
        "app.kubernetes.io/name": spec.name,
        "app.kubernetes.io/part-of": "remoe",
    }
    if not spec.public:
        labels["networking.knative.dev/visibility"] = "cluster-local"
    resources: dict[str, Json] = {"cpu": _cpu(spec.cpu), "memory": f"{spec.memory_mib}Mi"}
    probe: dict[str, Json] = {"httpGet": {"path": "/readyz", "port": _PORT}}
    # A heavy loader is given all of its progress deadline, less a margin, before it is restarted.
    start_up = max(1, int(policy.progress_deadline_s) - 10)
    container: dict[str, Json] = {
        "image": image,
        "command": ["python", "-m", spec.module],
        "env": [{"name": name, "value": value} for name, value in sorted(spec.env.items())],
        "ports": [{"name": "http1", "containerPort": _PORT}],
        "resources": {"requests": resources, "limits": resources},
        "readinessProbe": probe,
        "startupProbe": {**probe, "periodSeconds": 1, "failureThreshold": start_up},
    }
    annotations: dict[str, Json] = {PROGRESS_DEADLINE: f"{policy.progress_deadline_s:g}s"}
    annotations.update(spec.annotations)
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": spec.name, "labels": labels},
        "spec": {
            "template": {
                "metadata": {"annotations": dict(sorted(annotations.items()))},
                "spec": {
                    "containerConcurrency": spec.container_concurrency,
                    "timeoutSeconds": spec.timeout_s,
                    # Counted from the request's arrival, so it must allow for a cold start.
                    "responseStartTimeoutSeconds": spec.timeout_s,
                    "containers": [container],
                },
            }
        },
    }


def _cpu(cores: float) -> str:
    return f"{cores:g}" if cores == int(cores) else f"{round(cores * 1000)}m"
