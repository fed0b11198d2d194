"""A node's cache of the weights, filled by an init container, and wiped while an answer runs.

The cache is a claim on a volume that is a folder of the node.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from remoe.checkpoint import Checkpoint
from tests.e2e.cluster.asking import LONG_PROMPT, LONG_TOKENS, asked
from tests.e2e.cluster.conftest import CLAIM, NAMESPACE, WINDOW_S, Options, Record
from tests.e2e.cluster.kubernetes import Cluster, Flags, claim_on, empty_namespace

CACHE = "remoe-cache"
_FOLDER = "/var/tmp/remoe-e2e"  # noqa: S108  # the node's
_MODEL = "model"
_HELPER = "on-the-node"


@pytest.fixture(scope="module")
def node_cluster(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A namespace with claims on models and cache, and a pod that may do what it likes there."""
    bare = Cluster(f"{NAMESPACE}-node", tmp_path_factory.mktemp("node-home"))
    with Flags(bare) as flags:
        for name in ("persistent-volume-claim", "persistent-volume-write", "init-containers"):
            flags.set("config-features", f"kubernetes.podspec-{name}", "enabled")
        flags.set("config-autoscaler", "allow-zero-initial-scale", "true")
        name = bare.namespace
        models = claim_on(name, CLAIM, model_dir.parent)
        cache = claim_on(name, CACHE, _FOLDER, mode="ReadWriteMany")
        with (
            empty_namespace(bare, models, cache, enforce="privileged") as cluster,
            helper_pod(cluster),
        ):
            yield cluster


@contextmanager
def helper_pod(cluster: Cluster) -> Iterator[None]:
    """A pod with the node's folder, which functions may write to; it leaves the folder empty."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": _HELPER},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "volumes": [
                {"name": "cache", "hostPath": {"path": _FOLDER, "type": "DirectoryOrCreate"}}
            ],
            "containers": [
                {
                    "name": "helper",
                    "image": "kind.local/remoe-expert:v1",
                    "command": ["python", "-c", "import time; time.sleep(3600)"],
                    "securityContext": {"runAsUser": 0, "runAsNonRoot": False},
                    "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
                }
            ],
        },
    }
    cluster.kubectl("apply", "--validate=false", "-f", "-", stdin=json.dumps(pod))
    cluster.kubectl("wait", "--for=condition=Ready", "--timeout=100s", f"pod/{_HELPER}")
    wipe(cluster)
    on_node(cluster, "import os; os.chmod('/cache', 0o777)")
    yield
    wipe(cluster)


def on_node(cluster: Cluster, code: str) -> str:
    """Run Python beside the node's cache, which is at /cache."""
    return cluster.kubectl("exec", _HELPER, "--", "python", "-c", code)


def wipe(cluster: Cluster) -> None:
    on_node(
        cluster,
        "import os, shutil; [shutil.rmtree(f'/cache/{name}') for name in os.listdir('/cache')]",
    )


def digest(cluster: Cluster) -> str:
    """Of the weights in the node's cache."""
    code = "from pathlib import Path; from remoe.checkpoint import Checkpoint; "
    code += f"print(Checkpoint.open(Path('/cache/{_MODEL}')).digest)"
    return on_node(cluster, code).strip()


@pytest.fixture(scope="module")
def cached_options(model_dir: Path) -> Options:
    return (
        str(model_dir),
        *("--weights", f"claim:{CACHE}/{_MODEL}"),
        *("--cached-from", f"claim:{CLAIM}/{model_dir.name}"),
        *("--window", f"{WINDOW_S}s", "--cpu-request", "0.025"),
    )


def test_a_nodes_cache_wiped_in_mid_answer_changes_nothing(
    node_cluster: Cluster,
    cached_options: Options,
    model_dir: Path,
    local_answers: dict[str, str],
    record: Record,
) -> None:
    cluster, right = node_cluster, Checkpoint.open(model_dir).digest
    cluster.remoe("deploy", *cached_options)
    assert digest(cluster) == right
    before = asked(cluster, LONG_PROMPT, tokens=LONG_TOKENS)  # all are awake
    assert before.text == local_answers[LONG_PROMPT]
    victim = next(name for name in cluster.names("expert") if cluster.ready_pods(name))
    lost = {pod["metadata"]["name"] for pod in cluster.pods(victim)}
    assert lost
    left: list[int] = []  # pieces that came after cache and pods were gone

    def strike(pieces: int) -> None:
        if pieces == 5:
            killer.start()
        elif pieces > 5 and not killer.is_alive():
            left.append(pieces)

    def wipe_and_kill() -> None:
        wipe(cluster)
        now = ("--grace-period=0", "--force", "--wait=false")
        cluster.kubectl("delete", "pod", *lost, *now)

    killer = threading.Thread(target=wipe_and_kill)
    struck = asked(cluster, LONG_PROMPT, tokens=LONG_TOKENS, on_piece=strike)
    killer.join()
    assert left
    assert struck.text == local_answers[LONG_PROMPT]
    for name in ("remote_calls", "remote_retries", "local_fallbacks"):
        record(f"{name} while its cache was wiped", struck.x_remoe[name])
    # Who starts now finds nothing, and fetches the weights again.
    asked(cluster, LONG_PROMPT, tokens=4)
    refilled_s = cluster.wait_for(lambda: cluster.ready_pods(victim) > 0, within_s=120)
    record("pod back with its cache filled again after_s", refilled_s)
    assert digest(cluster) == right
    new = {pod["metadata"]["name"] for pod in cluster.pods(victim)} - lost
    loaded = [cluster.kubectl("logs", name, "-c", "load-weights") for name in new]
    assert any("loaded" in log for log in loaded), loaded
    after = asked(cluster, LONG_PROMPT, tokens=LONG_TOKENS)
    assert after.text == local_answers[LONG_PROMPT]
    assert after.x_remoe["remote_calls"] > 0


def test_other_weights_in_the_cache_are_replaced(
    node_cluster: Cluster, model_dir: Path, local_answers: dict[str, str]
) -> None:
    cluster = node_cluster
    victim = next(name for name in cluster.names("expert") if cluster.ready_pods(name))
    on_node(
        cluster,
        "import json; from pathlib import Path; "
        f"path = Path('/cache/{_MODEL}/config.json'); found = json.loads(path.read_text()); "
        "found['rms_norm_eps'] = 0.5; path.unlink(); path.write_text(json.dumps(found)); "
        f"(path.parent / 'remoe.json').unlink()",
    )
    assert digest(cluster) != Checkpoint.open(model_dir).digest
    lost = [pod["metadata"]["name"] for pod in cluster.pods(victim)]
    cluster.kubectl("delete", "pod", *lost, "--grace-period=0", "--force", "--wait=false")
    answered = asked(cluster, LONG_PROMPT, tokens=LONG_TOKENS)
    assert answered.text == local_answers[LONG_PROMPT]
    cluster.wait_for(lambda: cluster.ready_pods(victim) > 0, within_s=120)
    assert digest(cluster) == Checkpoint.open(model_dir).digest
    cluster.remoe("destroy", "--yes")
