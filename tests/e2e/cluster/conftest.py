"""A deployment of the default model on the cluster that KUBECONFIG names, made by `remoe deploy`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from remoe.cli.model import built_model
from tests.e2e.cluster.kubernetes import Cluster, Json
from tests.e2e.platform import Platform

NAMESPACE = os.environ.get("REMOE_E2E_NAMESPACE", "remoe-e2e")
CLAIM = "remoe-models"
WINDOW_S = 12
Record = Callable[[str, object], None]
_MEASURED: dict[str, object] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a cluster; without one it says so instead of failing."""
    missing = _missing()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.timeout(600))
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))


def _missing() -> str | None:
    if not os.environ.get("KUBECONFIG"):
        return "no cluster: set KUBECONFIG to one with Knative Serving (docs/knative.md)"
    if shutil.which("kubectl") is None:
        return "no kubectl, which these tests look at the cluster with"
    probe = subprocess.run(
        ["kubectl", "get", "deployments", "-n", "knative-serving", "controller"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return f"the cluster does not answer: {probe.stderr}" if probe.returncode else None


@pytest.fixture
def record() -> Record:
    """Keep a measured value, for the summary at the end."""
    return _MEASURED.__setitem__


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _MEASURED:
        terminalreporter.section("measured on the cluster")
    for name, value in _MEASURED.items():
        terminalreporter.line(f"{name}: {value}")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model; its folder must be reachable at the same path on the node."""
    return Path(os.environ.get("REMOE_E2E_MODEL") or built_model()).resolve()


@pytest.fixture(scope="session")
def cluster(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An empty namespace that holds pods to the restricted standard, and a claim on the model."""
    cluster = Cluster(NAMESPACE, tmp_path_factory.mktemp("home"))
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")
    cluster.kubectl("delete", "pv", f"{NAMESPACE}-models", "--ignore-not-found", "--wait")
    objects = json.dumps({"apiVersion": "v1", "kind": "List", "items": _volume(model_dir)})
    # The server checks them; kubectl's own check fetches a schema that takes seconds to make.
    cluster.kubectl("apply", "--validate=false", "-f", "-", stdin=objects)
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    cluster.kubectl("delete", "pv", f"{NAMESPACE}-models", "--wait=false")


def _volume(model_dir: Path) -> list[Json]:
    enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
    size = {"storage": "10Gi"}
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": enforce},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"{NAMESPACE}-models"},
            "spec": {
                "capacity": size,
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "hostPath": {"path": str(model_dir.parent)},
                "claimRef": {"namespace": NAMESPACE, "name": CLAIM},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CLAIM, "namespace": NAMESPACE},
            "spec": {
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "volumeName": f"{NAMESPACE}-models",
                "resources": {"requests": size},
            },
        },
    ]


@pytest.fixture(scope="session")
def options(model_dir: Path) -> tuple[str, ...]:
    """What every `remoe deploy` here is told."""
    return (
        str(model_dir),
        *("--weights", f"claim:{CLAIM}/{model_dir.name}"),
        *("--window", f"{WINDOW_S}s", "--cpu-request", "0.025"),
    )


@pytest.fixture(scope="session")
def deployed_s(cluster: Cluster, options: tuple[str, ...]) -> float:
    """How long `remoe deploy` took from nothing until everything was ready."""
    began = time.monotonic()
    cluster.remoe("deploy", *options)
    return time.monotonic() - began


@pytest.fixture(scope="session")
def local_answers(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Greedy answers of the same model in the local runtime, by prompt."""
    from tests.e2e.cluster.asking import PROMPTS, answer

    with Platform(model_dir, tmp_path_factory.mktemp("local"), "--window", "12s") as platform:
        return {prompt: answer(platform.client, prompt).text for prompt in PROMPTS}
