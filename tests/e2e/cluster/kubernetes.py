"""A cluster as these tests see it: kubectl for what is there, and `remoe` for what is done to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import openai

__all__ = ["Cluster", "Flags", "Json", "claim_on", "empty_namespace"]

Json = dict[str, Any]
_SERVICE_LABEL = "serving.knative.dev/service"


class Cluster:
    """One namespace of the cluster that KUBECONFIG names."""

    def __init__(self, namespace: str, home: Path) -> None:
        self.namespace = namespace
        self.home = home
        # Without anybody's hardware profile: half of the experts are remote whatever they cost.
        self._env = {**os.environ, "REMOE_HOME": str(home), "NO_COLOR": "1", "COLUMNS": "160"}

    def kubectl(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        done = subprocess.run(
            ["kubectl", "--namespace", self.namespace, *arguments],
            capture_output=True,
            text=True,
            check=False,
            input=stdin,
            timeout=120,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def get(self, *what: str) -> list[Json]:
        items: list[Json] = json.loads(self.kubectl("get", *what, "-o", "json"))["items"]
        return items

    def remoe(
        self, command: str, *arguments: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command that takes a namespace, which is this one."""
        return self.command(command, *arguments, "--namespace", self.namespace, check=check)

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "remoe.cli", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=self._env,
            timeout=420,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def services(self, component: str | None = None) -> list[Json]:
        label = "app.kubernetes.io/part-of=remoe"
        if component:
            label += f",app.kubernetes.io/component={component}"
        return self.get("services.serving.knative.dev", "-l", label)

    def pods(self, service: str) -> list[Json]:
        """A service's pods that are not on their way out."""
        found = self.get("pods", "-l", f"{_SERVICE_LABEL}={service}")
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def ready_pods(self, service: str) -> int:
        return sum(_ready(pod["status"]) for pod in self.pods(service))

    def names(self, component: str) -> list[str]:
        return sorted(service["metadata"]["name"] for service in self.services(component))

    def revisions(self) -> dict[str, str]:
        """The newest Revision of each Service."""
        return {
            service["metadata"]["name"]: service["status"]["latestCreatedRevisionName"]
            for service in self.services()
        }

    def all_ready(self) -> bool:
        services = self.services()
        return bool(services) and all(_ready(service.get("status", {})) for service in services)

    def experts_asleep(self) -> bool:
        names = self.names("expert")
        return bool(names) and not any(self.pods(name) for name in names)

    def wait_for(self, holds: Callable[[], bool], *, within_s: float) -> float:
        """Seconds until it held: the cluster's clock is its own."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < within_s, self.kubectl(
                "get", "ksvc,pods", "-o", "wide"
            )
            time.sleep(0.2)
        return time.monotonic() - began

    def address_of(self, service: str) -> tuple[str, dict[str, str]]:
        """A service behind the cluster's ingress: its URL there, and the header that chooses it."""
        ingress = self.kubectl(
            *("get", "service", "kourier-internal", "-n", "kourier-system"),
            *("-o", "jsonpath={.spec.clusterIP}"),
        )
        url = self.kubectl("get", "ksvc", service, "-o", "jsonpath={.status.address.url}")
        return f"http://{ingress}", {"Host": url.removeprefix("http://")}

    @contextmanager
    def client(self, service: str) -> Iterator[openai.OpenAI]:
        """OpenAI's client to a service."""
        url, headers = self.address_of(service)
        with openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=300,
            default_headers=headers,
        ) as client:
            yield client


def _ready(status: Json) -> bool:
    conditions = status.get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


class Flags:
    """Keys of Knative's ConfigMaps, set as a test needs them and put back when the block ends."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._before: dict[tuple[str, str], str | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for (config, key), value in self._before.items():
            self._patch(config, key, value)

    def get(self, config: str, key: str) -> str | None:
        found: Json = json.loads(self._cluster.kubectl("get", "configmap", config, *_JSON))
        value: str | None = found.get("data", {}).get(key)
        return value

    def set(self, config: str, key: str, value: str | None) -> None:
        """None takes the key away: Knative's own default holds then."""
        self._before.setdefault((config, key), self.get(config, key))
        self._patch(config, key, value)

    def _patch(self, config: str, key: str, value: str | None) -> None:
        data = json.dumps({"data": {key: value}})
        where = ("-n", "knative-serving", "--type", "merge", "-p", data)
        self._cluster.kubectl("patch", "configmap", config, *where)


_JSON = ("-n", "knative-serving", "-o", "json")


def claim_on(
    namespace: str, claim: str, folder: str | Path, *, mode: str = "ReadOnlyMany"
) -> list[Json]:
    """A claim bound to a folder of the (one) node, and the volume that it is bound to."""
    volume = f"{namespace}-{claim}"
    size = {"storage": "10Gi"}
    shared: Json = {"accessModes": [mode], "storageClassName": ""}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {
                **shared,
                "capacity": size,
                "hostPath": {"path": str(folder)},
                "claimRef": {"namespace": namespace, "name": claim},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": namespace},
            "spec": {**shared, "volumeName": volume, "resources": {"requests": size}},
        },
    ]


@contextmanager
def empty_namespace(
    cluster: Cluster, *claims: list[Json], enforce: str = "restricted"
) -> Iterator[Cluster]:
    """The cluster's namespace, new, holding pods to a standard, with claims of `claim_on`."""
    name = cluster.namespace
    labels = {"pod-security.kubernetes.io/enforce": enforce}
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    objects = [space, *(one for some in claims for one in some)]
    volumes = [one["metadata"]["name"] for one in objects if one["kind"] == "PersistentVolume"]
    cluster.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait")
    cluster.kubectl("delete", "pv", *volumes, "--ignore-not-found", "--wait")
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    # The server checks them; kubectl's own check fetches a schema that takes seconds to make.
    cluster.kubectl("apply", "--validate=false", "-f", "-", stdin=everything)
    try:
        yield cluster
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")
        cluster.kubectl("delete", "pv", *volumes, "--wait=false")
