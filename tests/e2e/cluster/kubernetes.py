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
from typing import Any

import openai

__all__ = ["Cluster", "Json"]

Json = dict[str, Any]
_SERVICE_LABEL = "serving.knative.dev/service"


class Cluster:
    """One namespace of the cluster that KUBECONFIG names."""

    def __init__(self, namespace: str, home: Path) -> None:
        self.namespace = namespace
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
        done = subprocess.run(
            [
                *(sys.executable, "-m", "remoe.cli", command, *arguments),
                *("--namespace", self.namespace),
            ],
            capture_output=True,
            text=True,
            check=False,
            env=self._env,
            timeout=300,
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
