"""What `target-burst-capacity` does to waking, to bursts and to each call, on a real cluster.

    KUBECONFIG=... python bench/burst_capacity.py MODEL_DIR --namespace remoe-bench \
        --weights claim:remoe-models/FOLDER [--capacities 0 -1 200]

Deploys the model into a namespace that is there, with each capacity in turn, and asks it:
eight callers at once while all expert functions are at zero; one caller with all awake; calls of
one function from the main function's container, through ingress and queue-proxy (and activator, as
the capacity has it), and to the pod's queue-proxy and to its container directly; and twenty callers
of one function at once. What it deployed is destroyed at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec

from main_model_fn.call_times import expert_call
from remoe.checkpoint import Checkpoint
from remoe.expert_call import CONTENT_TYPE, PATH
from tests.e2e.cluster.asking import PROMPTS, asked
from tests.e2e.cluster.kubernetes import Cluster
from tests.e2e.cluster.test_cluster import expert_token

WINDOW = "6s"
BURST, CALLERS, CALLS = 8, 20, 10


def call_times(cluster: Cluster, main: str, *arguments: str) -> Any:
    inside = ("exec", main, "-c", "user-container", "--")
    measure = ("python", "-m", "main_model_fn.call_times", "--calls", "200", *arguments)
    return json.loads(cluster.kubectl(*inside, *measure))["invocation"]


def callers_at_once(
    cluster: Cluster, function: str, checkpoint: Checkpoint
) -> tuple[list[float], list[str]]:
    """Milliseconds of each call, its computing included, and what went wrong with others."""
    url, headers = cluster.address_of(function)
    headers |= {"content-type": CONTENT_TYPE, **expert_token(cluster)}
    body = msgspec.msgpack.encode(expert_call(checkpoint, checkpoint.moe_layers[0], 64))

    broken: list[str] = []

    def calls(_: int) -> list[float]:
        took = []
        with httpx.Client(timeout=120) as client:
            for _call in range(CALLS):
                began = time.perf_counter()
                try:
                    client.post(url + PATH, content=body, headers=headers).raise_for_status()
                except httpx.HTTPError as error:
                    broken.append(str(error))
                else:
                    took.append(1e3 * (time.perf_counter() - began))
        return took

    with ThreadPoolExecutor(CALLERS) as burst:
        return [one for some in burst.map(calls, range(CALLERS)) for one in some], broken


def measure(cluster: Cluster, checkpoint: Checkpoint) -> dict[str, object]:
    function, (main,) = cluster.names("expert")[0], cluster.names("main")
    asked(cluster, PROMPTS[0])  # the main function is awake
    to_zero_s = cluster.wait_for(cluster.experts_asleep, within_s=200)
    with ThreadPoolExecutor(BURST) as burst:
        woken = list(burst.map(lambda i: asked(cluster, PROMPTS[i % len(PROMPTS)]), range(BURST)))
    warm = [asked(cluster, prompt) for prompt in PROMPTS]
    main_pod = cluster.pods(main)[0]["metadata"]["name"]
    through = call_times(cluster, main_pod)
    address = cluster.pods(function)[0]["status"]["podIP"]
    ports = {"queue-proxy": 8012, "container": 8080}
    direct = {
        name: call_times(cluster, main_pod, "--url", f"http://{address}:{port}")["median_s"]
        for name, port in ports.items()
    }
    together, broken = callers_at_once(cluster, function, checkpoint)
    firsts = [one.first_s for one in woken]
    return {
        "to zero, s": round(to_zero_s, 1),
        "burst from zero: first tokens, s": [
            round(value, 2) for value in (min(firsts), statistics.median(firsts), max(firsts))
        ],
        "warm first token, s": round(statistics.median(one.first_s for one in warm), 3),
        "warm token, ms": round(statistics.median(one.x_remoe["tpot_ms"] for one in warm), 1),
        "call beside computing, ms (median, P95)": [
            round(1e3 * through[f"{name}_s"], 2) for name in ("median", "p95")
        ],
        **{f"call to the {name}, ms": round(1e3 * value, 2) for name, value in direct.items()},
        f"{CALLERS} callers: calls, ms (median, P95)": [
            round(statistics.quantiles(together, n=20)[place], 1) for place in (9, 18)
        ],
        f"of {CALLERS * CALLS} calls broken": len(broken),
        "the first of them": broken[:1],
        "pods after": cluster.ready_pods(function),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--capacities", type=int, nargs="+", default=[0, -1, 200])
    parser.add_argument("--namespace", default="remoe-bench")
    parser.add_argument("--weights", default="claim:remoe-models")
    parser.add_argument("--cpu-request", default="0.025")
    given = parser.parse_args()
    # Without a hardware profile half of the experts are remote, whatever they cost.
    cluster = Cluster(given.namespace, Path(tempfile.mkdtemp()))
    checkpoint = Checkpoint.open(given.model_dir)
    options = ("--weights", given.weights, "--window", WINDOW, "--cpu-request", given.cpu_request)
    try:
        for capacity in given.capacities:
            told = (*options, "--burst-capacity", str(capacity))
            cluster.remoe("deploy", str(given.model_dir), *told)
            found = {"target-burst-capacity": capacity, **measure(cluster, checkpoint)}
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
    finally:
        cluster.remoe("destroy", "--yes", check=False)


if __name__ == "__main__":
    main()
