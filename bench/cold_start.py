"""Cold start of the main function with half of the experts, against processes that load them all.

    python bench/cold_start.py

From a process's start until it is ready to generate, and until it has told the first token after a
prompt of 32, the files in the page cache: the main function as the runtime starts it, with half of
each layer's experts and with all of them, and transformers' `from_pretrained`. Experts that are not
resident are computed in the main function (`in-process`): functions have cold starts of their own,
in bench/expert_kernel.py. And what of that is importing, which no partition changes.
"""

from __future__ import annotations

import argparse
import http.client
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec

from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.functions import FunctionProcess
from remoe.cli.model import built_model
from remoe.experts import Partition
from remoe.generation import GenerateRequest, SamplingParams
from remoe.plan import Deployment

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
print("ready", flush=True)
prompt = torch.arange(1, 33)[None]
model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
print("told", flush=True)
"""
IMPORTS = "import torch, transformers.models.mixtral.modeling_mixtral"
OUR_IMPORTS = "import main_model_fn.app"


@contextmanager
def planner(checkpoint: Checkpoint, share: float) -> Iterator[str]:
    """Says which experts a main function is to hold: all but `share` of each layer's."""
    remote = tuple(range(round(checkpoint.experts * share)))
    deployment = Deployment(
        plan_id="bench",
        model_digest=checkpoint.digest,
        partition=Partition(
            experts=checkpoint.experts,
            remote=tuple(
                remote if layer in checkpoint.moe_layers else ()
                for layer in range(checkpoint.layers)
            ),
        ),
        main_memory_gb=1.0,
        origin="static",
    )

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = msgspec.json.encode(deployment)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def main_function(model_dir: Path, share: float) -> list[float]:
    """Seconds until it is ready, and until its first token; it takes all processors."""
    env = {"REMOE_MAIN_TRANSPORT": "in-process"}
    with (
        tempfile.TemporaryDirectory() as folder,
        planner(Checkpoint.open(model_dir), share) as url,
        FunctionProcess("main_model_fn", model_dir, Path(folder), env, planner_url=url) as function,
    ):
        ready = function.start()
        began = time.perf_counter()
        first_token(function.port)
        return [ready, ready + time.perf_counter() - began]


def first_token(port: int) -> None:
    request = GenerateRequest(
        request_id="bench",
        plan_id=None,
        prompt_tokens=list(range(1, 33)),
        max_new_tokens=1,
        stop_tokens=[],
        sampling=SamplingParams(temperature=0),
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/generate", msgspec.json.encode(request))
    told = msgspec.json.decode(connection.getresponse().readline())
    connection.close()
    assert len(told["tokens"]) == 1, told


def process(code: str, *words: str, lines: int = 1) -> list[float]:
    """Seconds until it prints each of its lines, or ends."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as started:
        assert started.stdout is not None
        took = []
        for _ in range(lines):
            started.stdout.readline()
            took.append(time.perf_counter() - began)
        started.kill()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, help="default: the built default model")
    parser.add_argument("--starts", type=int, default=7)
    given = parser.parse_args()
    model_dir = given.model_dir or built_model()
    ways: dict[str, Callable[[], list[float]]] = {
        "main function, half of the experts": lambda: main_function(model_dir, 0.5),
        "main function, all experts": lambda: main_function(model_dir, 0.0),
        "transformers, all experts": lambda: process(TRANSFORMERS, str(model_dir), lines=2),
        "importing torch and transformers": lambda: process(IMPORTS),
        "importing the main function": lambda: process(OUR_IMPORTS),
    }
    took: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(given.starts):
        for name, start in random.sample(list(ways.items()), len(ways)):
            took[name].append(start())
    middle = {
        name: [statistics.median(one) for one in zip(*starts, strict=True)]
        for name, starts in took.items()
    }
    base = middle["transformers, all experts"]
    print("| | ready after, s | against transformers | first token after, s | against |")
    print("|---|--:|--:|--:|--:|")
    for name, seconds in middle.items():
        cells = [f"{s:.2f} | {s / b:.2f} x" for s, b in zip(seconds, base, strict=False)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
