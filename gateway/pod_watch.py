"""The deployment's pods, from the Kubernetes API: what the resident ledger counts on a cluster.

A list, then a watch from there, as every controller does it; when the server ends the watch or has
forgotten the version, it begins again. The gateway's own service account may list and watch pods of
its namespace, and nothing else.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import time

import aiohttp
import msgspec

from gateway.runtime_watch import Source
from remoe.quantities import parse_quantity
from remoe.runtime_status import FunctionStatus, ReplicaState, ReplicaStatus, RuntimeStatus

__all__ = ["ApiServer", "pods_say"]

SERVICE_LABEL = "serving.knative.dev/service"
_SELECTOR = "app.kubernetes.io/part-of=remoe"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_USER_CONTAINER = "user-container"
_WATCH_S = 300
_LONGEST_LINE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ApiServer:
    """Where the API is and how this pod shows who it is; the kubelet renews the token's file."""

    url: str
    namespace: str
    token_file: Path
    authority: Path | None

    @classmethod
    def of_this_pod(cls, environment: dict[str, str], account: Path = _ACCOUNT) -> ApiServer | None:
        """None outside of a cluster, or in a pod without a service account's token."""
        host = environment.get("KUBERNETES_SERVICE_HOST")
        if host is None or not (account / "token").exists():
            return None
        host = f"[{host}]" if ":" in host else host
        port = environment.get("KUBERNETES_SERVICE_PORT", "443")
        namespace = (account / "namespace").read_text(encoding="utf-8").strip()
        return cls(f"https://{host}:{port}", namespace, account / "token", account / "ca.crt")

    def headers(self) -> dict[str, str]:
        token = self.token_file.read_text(encoding="utf-8").strip()
        return {"authorization": f"Bearer {token}", "accept": "application/json"}

    def tls(self) -> ssl.SSLContext | bool:
        return ssl.create_default_context(cafile=str(self.authority)) if self.authority else True


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    uid: str = ""
    labels: dict[str, str] = {}
    creation_timestamp: str = ""
    deletion_timestamp: str = ""
    resource_version: str = ""


class _Resources(msgspec.Struct):
    limits: dict[str, str] = {}


class _Container(msgspec.Struct):
    name: str
    resources: _Resources = msgspec.field(default_factory=_Resources)


class _Spec(msgspec.Struct, rename="camel"):
    containers: list[_Container] = []
    node_name: str = ""


class _Condition(msgspec.Struct):
    type: str
    status: str


class _Status(msgspec.Struct):
    phase: str = ""
    conditions: list[_Condition] = []


class Pod(msgspec.Struct):
    metadata: _Metadata
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)

    @property
    def holds_memory(self) -> bool:
        """From its place on a node to its end; a pod that waits for a node holds nothing."""
        return bool(self.spec.node_name) and self.status.phase not in {"Succeeded", "Failed"}

    @property
    def memory_limit_bytes(self) -> int:
        """Of the function itself; queue-proxy is the platform's."""
        for container in self.spec.containers:
            if container.name == _USER_CONTAINER:
                return int(parse_quantity(container.resources.limits.get("memory", "0")))
        return 0

    @property
    def state(self) -> ReplicaState:
        if self.metadata.deletion_timestamp:
            return "draining"
        ready = any(one.type == "Ready" and one.status == "True" for one in self.status.conditions)
        return "ready" if ready else "starting"


class _List(msgspec.Struct):
    metadata: _Metadata
    items: list[Pod]


class _Change(msgspec.Struct):
    type: str
    object: msgspec.Raw


_list_decoder = msgspec.json.Decoder(_List)
_change_decoder = msgspec.json.Decoder(_Change)
_pod_decoder = msgspec.json.Decoder(Pod)


def pods_say(server: ApiServer, *, model: str, url: str) -> Source:
    """The state after each change of any pod of the deployment."""

    async def read() -> AsyncGenerator[RuntimeStatus, None]:
        path = f"{server.url}/api/v1/namespaces/{server.namespace}/pods"
        connector = aiohttp.TCPConnector(ssl=server.tls())
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_WATCH_S + 30)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=_LONGEST_LINE_BYTES
        ) as http:
            query = {"labelSelector": _SELECTOR}
            async with http.get(path, params=query, headers=server.headers()) as response:
                response.raise_for_status()
                listed = _list_decoder.decode(await response.read())
            pods = {pod.metadata.uid: pod for pod in listed.items}
            began = time()
            yield _status(pods.values(), server.namespace, model=model, url=url, began=began)
            query |= {
                "watch": "true",
                "resourceVersion": listed.metadata.resource_version,
                "timeoutSeconds": str(_WATCH_S),
            }
            async with http.get(path, params=query, headers=server.headers()) as response:
                response.raise_for_status()
                async for line in response.content:
                    change = _change_decoder.decode(line)
                    if change.type == "ERROR":
                        return  # the version is too old: list again
                    if change.type == "BOOKMARK":
                        continue
                    pod = _pod_decoder.decode(change.object)
                    if change.type == "DELETED":
                        pods.pop(pod.metadata.uid, None)
                    else:
                        pods[pod.metadata.uid] = pod
                    yield _status(
                        pods.values(), server.namespace, model=model, url=url, began=began
                    )

    return read


def _status(
    pods: Iterable[Pod], namespace: str, *, model: str, url: str, began: float
) -> RuntimeStatus:
    by_service: dict[str, list[Pod]] = {}
    for pod in pods:
        service = pod.metadata.labels.get(SERVICE_LABEL)
        if service is not None and pod.holds_memory:
            by_service.setdefault(service, []).append(pod)
    return RuntimeStatus(
        pid=0,
        url=url,
        model=model,
        up_s=time() - began,
        functions=[_function(name, one, namespace) for name, one in sorted(by_service.items())],
        events=[],
    )


def _function(name: str, pods: list[Pod], namespace: str) -> FunctionStatus:
    """Of a function, what its pods say; what only the local supervisor counts is zero."""
    states = [pod.state for pod in pods]
    found: list[ReplicaState] = ["ready", "starting", "draining"]
    return FunctionStatus(
        name=name,
        holds="",
        url=f"http://{name}.{namespace}.svc.cluster.local",
        state=next(state for state in found if state in states),
        detail="",
        desired=len(states) - states.count("draining"),
        ready=states.count("ready"),
        in_flight=0,
        requests=0,
        last_call_s=None,
        memory_bytes=0,
        mapped_bytes=0,
        memory_limit_bytes=max(pod.memory_limit_bytes for pod in pods),
        cold_starts=0,
        cold_start_last_ms=None,
        cold_start_total_ms=0.0,
        crashes=0,
        restarts=0,
        memory_kills=0,
        refused=0,
        replicas=[
            ReplicaStatus(
                name=pod.metadata.name,
                pid=0,
                state=pod.state,
                age_s=_age_s(pod.metadata.creation_timestamp),
                in_flight=0,
                memory_bytes=0,
                mapped_bytes=0,
            )
            for pod in pods
        ],
    )


def _age_s(made: str) -> float:
    return time() - datetime.fromisoformat(made).timestamp() if made else 0.0
