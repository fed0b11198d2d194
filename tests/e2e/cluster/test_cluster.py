"""Remoe on a real cluster: from nothing to an answer, through changes and faults, to nothing.

The tests build on each other and run in this order; what they measure is listed at the end.
"""

from __future__ import annotations

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest

from main_model_fn.call_times import expert_call
from remoe.checkpoint import Checkpoint
from remoe.expert_call import CONTENT_TYPE, PATH
from tests.e2e.cluster.asking import LONG_PROMPT, LONG_TOKENS, PROMPTS, asked
from tests.e2e.cluster.conftest import WINDOW_S, Options, Record
from tests.e2e.cluster.kubernetes import Cluster

# From the last request to zero: the window, Knative's grace of 30 s, and a slow machine.
_TO_ZERO_S = WINDOW_S + 120


@pytest.fixture(scope="module")
def deployed_s(cluster: Cluster, options: Options) -> float:
    """How long `remoe deploy` took from nothing until everything was ready."""
    began = time.monotonic()
    cluster.remoe("deploy", *options)
    return time.monotonic() - began


def test_from_nothing_to_the_first_token_and_back_to_zero(
    cluster: Cluster, deployed_s: float, record: Record
) -> None:
    assert cluster.all_ready()
    assert cluster.experts_asleep()
    cold = asked(cluster, PROMPTS[0])
    assert cold.finish is not None
    assert cold.x_remoe["remote_calls"] > 0
    assert cold.x_remoe["cold_start"]["experts_ms"] > 0
    assert not cluster.experts_asleep()
    warm = asked(cluster, PROMPTS[0])
    assert warm.text == cold.text
    assert warm.x_remoe["cold_start_ms"] == 0
    to_zero_s = cluster.wait_for(cluster.experts_asleep, within_s=_TO_ZERO_S)
    for name, value in (
        ("deploy_s", deployed_s),
        ("cold_first_token_s", cold.first_s),
        ("cold_start", cold.x_remoe["cold_start"]),
        ("warm_first_token_s", warm.first_s),
        ("warm_token_ms", warm.x_remoe["tpot_ms"]),
        ("experts_at_zero_after_s", to_zero_s),
    ):
        record(name, value)


@pytest.mark.usefixtures("deployed_s")
def test_answers_are_those_of_the_local_runtime(
    cluster: Cluster, local_answers: dict[str, str]
) -> None:
    assert {prompt: asked(cluster, prompt).text for prompt in PROMPTS} == {
        prompt: local_answers[prompt] for prompt in PROMPTS
    }


@pytest.mark.usefixtures("deployed_s")
def test_deploying_the_same_again_makes_no_revision(cluster: Cluster, options: Options) -> None:
    before = cluster.revisions()
    assert "Nothing would change" in cluster.remoe("diff", *options, "--exit-code").stdout
    cluster.remoe("deploy", *options)
    assert cluster.revisions() == before


@pytest.mark.usefixtures("deployed_s")
def test_an_expert_functions_pod_deleted_in_mid_answer_changes_nothing(
    cluster: Cluster, local_answers: dict[str, str], record: Record
) -> None:
    asked(cluster, LONG_PROMPT)  # all are awake
    victim = next(name for name in cluster.names("expert") if cluster.ready_pods(name))
    lost = {pod["metadata"]["name"] for pod in cluster.pods(victim)}
    killer = threading.Thread(
        target=cluster.kubectl,
        args=("delete", "pod", *lost, "--grace-period=0", "--force", "--wait=false"),
    )
    left: list[int] = []  # pieces that came after its pods were gone

    def kill(pieces: int) -> None:
        if pieces == 5:
            killer.start()
        elif pieces > 5 and not killer.is_alive():
            left.append(pieces)

    struck = asked(cluster, LONG_PROMPT, tokens=LONG_TOKENS, on_piece=kill)
    killer.join()
    assert struck.text == local_answers[LONG_PROMPT]
    assert left
    assert lost.isdisjoint(pod["metadata"]["name"] for pod in cluster.pods(victim))
    for name in ("remote_calls", "remote_retries", "local_fallbacks"):
        record(f"{name} while a pod was deleted", struck.x_remoe[name])


@pytest.mark.usefixtures("deployed_s")
def test_a_burst_scales_an_expert_function_to_its_most_and_back(
    cluster: Cluster, model_dir: Path, record: Record
) -> None:
    name = cluster.names("expert")[0]
    (service,) = (one for one in cluster.services("expert") if one["metadata"]["name"] == name)
    annotations = service["spec"]["template"]["metadata"]["annotations"]
    most = int(annotations["autoscaling.knative.dev/max-scale"])
    url, headers = cluster.address_of(name)
    headers |= {"content-type": CONTENT_TYPE, **expert_token(cluster)}
    checkpoint = Checkpoint.open(model_dir)
    body = msgspec.msgpack.encode(expert_call(checkpoint, checkpoint.moe_layers[0], 512))
    enough = threading.Event()

    def keep_calling(_: int) -> set[int]:
        statuses = set()
        with httpx.Client(timeout=120) as client:
            while not enough.is_set():
                reply = client.post(url + PATH, content=body, headers=headers)
                statuses.add(reply.status_code)
        return statuses

    with ThreadPoolExecutor(20) as burst:
        calls = [burst.submit(keep_calling, index) for index in range(20)]
        try:
            scaled_s = cluster.wait_for(lambda: cluster.ready_pods(name) == most, within_s=120)
        finally:
            enough.set()
        assert set().union(*(call.result() for call in calls)) == {200}
    back_s = cluster.wait_for(lambda: not cluster.pods(name), within_s=_TO_ZERO_S + 30)
    record("burst_to_max_s", scaled_s)
    record("burst_to_zero_s", back_s)


def expert_token(cluster: Cluster) -> dict[str, str]:
    encoded = cluster.kubectl("get", "secret", "remoe-expert-token", "-o", "jsonpath={.data.token}")
    return {"authorization": f"Bearer {base64.b64decode(encoded).decode()}"}


@pytest.mark.usefixtures("deployed_s")
def test_twenty_requests_at_once_are_all_answered(
    cluster: Cluster, local_answers: dict[str, str]
) -> None:
    with ThreadPoolExecutor(20) as burst:
        texts = list(burst.map(lambda index: asked(cluster, PROMPTS[index % 4]).text, range(20)))
    assert texts == [local_answers[PROMPTS[index % 4]] for index in range(20)]


@pytest.mark.usefixtures("deployed_s")
def test_destroy_leaves_nothing(cluster: Cluster, record: Record) -> None:
    began = time.monotonic()
    cluster.remoe("destroy", "--yes")
    record("destroy_s", time.monotonic() - began)
    kinds = cluster.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    kinds = [kind for kind in kinds if not kind.startswith("events")]
    left = cluster.get(",".join(kinds), "--ignore-not-found")
    # What every namespace has (some kinds of Kubernetes put more certificates there), and the claim.
    names = {f"{one['kind']} {one['metadata']['name']}" for one in left}
    names = {name for name in names if not (name.startswith("ConfigMap") and name.endswith(".crt"))}
    assert names == {"ServiceAccount default", "PersistentVolumeClaim remoe-models"}
