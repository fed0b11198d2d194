"""A deployment of the default model on the cluster that KUBECONFIG names, made by `remoe deploy`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from remoe.cli.model import built_model
from tests.e2e.cluster.asking import LONG_PROMPT, LONG_TOKENS, PROMPTS, TOKENS, answer
from tests.e2e.cluster.kubernetes import Cluster, Flags, claim_on, empty_namespace
from tests.e2e.platform import Platform

NAMESPACE = os.environ.get("REMOE_E2E_NAMESPACE", "remoe-e2e")
CLAIM = "remoe-models"
WINDOW_S = 12
Options = tuple[str, ...]
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
    """An empty namespace that holds pods to the restricted standard, and a claim on the model.

    Knative has the flags that it takes; they are as they were afterwards.
    """
    bare = Cluster(NAMESPACE, tmp_path_factory.mktemp("home"))
    with Flags(bare) as flags:
        flags.set("config-features", "kubernetes.podspec-persistent-volume-claim", "enabled")
        flags.set("config-autoscaler", "allow-zero-initial-scale", "true")
        with empty_namespace(bare, claim_on(NAMESPACE, CLAIM, model_dir.parent)) as cluster:
            yield cluster


@pytest.fixture(scope="session")
def options(model_dir: Path) -> Options:
    """What every `remoe deploy` here is told."""
    return (
        str(model_dir),
        *("--weights", f"claim:{CLAIM}/{model_dir.name}"),
        *("--window", f"{WINDOW_S}s", "--cpu-request", "0.025"),
    )


@pytest.fixture(scope="session")
def local_answers(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Greedy answers of the same model in the local runtime, by prompt."""
    lengths = {**dict.fromkeys(PROMPTS, TOKENS), LONG_PROMPT: LONG_TOKENS}
    with Platform(model_dir, tmp_path_factory.mktemp("local"), "--window", "12s") as platform:
        return {
            prompt: _undisturbed(platform.client, prompt, tokens=tokens)
            for prompt, tokens in lengths.items()
        }


def _undisturbed(client: openai.OpenAI, prompt: str, *, tokens: int) -> str:
    """An answer of which no call was given up.

    What the main function computes in a late function's place is rounded elsewhere, and bfloat16
    then decides otherwise where two tokens are as likely.
    """
    for _ in range(5):
        found = answer(client, prompt, tokens=tokens)
        if found.x_remoe["local_fallbacks"] == 0:
            return found.text
    pytest.fail("the local runtime gave calls up in five answers: this machine has too much to do")
