"""Cold start of the main function with half of the experts, against processes that load them all.

    python bench/cold_start.py

From a process's start until it is ready to generate, the files in the page cache: the main function
as the runtime starts it, with half of each layer's experts and with all of them, and transformers'
`from_pretrained`. And what of that is importing, which no partition changes. Cold starts of expert
functions are in bench/expert_kernel.py.
"""

from __future__ import annotations

import argparse
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
from remoe.plan import Deployment

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
print("ready", flush=True)
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


def main_function(model_dir: Path, share: float) -> float:
    """Seconds until it is ready; of this machine's processors it takes all."""
    with (
        tempfile.TemporaryDirectory() as folder,
        planner(Checkpoint.open(model_dir), share) as url,
        FunctionProcess("main_model_fn", model_dir, Path(folder), {}, planner_url=url) as function,
    ):
        return function.start()


def process(code: str, *words: str) -> float:
    """Seconds until it prints a line, or ends."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as started:
        assert started.stdout is not None
        started.stdout.readline()
        took = time.perf_counter() - began
        started.kill()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, help="default: the built default model")
    parser.add_argument("--starts", type=int, default=7)
    given = parser.parse_args()
    model_dir = given.model_dir or built_model()
    ways: dict[str, Callable[[], float]] = {
        "main function, half of the experts": lambda: main_function(model_dir, 0.5),
        "main function, all experts": lambda: main_function(model_dir, 0.0),
        "transformers, all experts": lambda: process(TRANSFORMERS, str(model_dir)),
        "importing torch and transformers": lambda: process(IMPORTS),
        "importing the main function": lambda: process(OUR_IMPORTS),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.starts):
        for name, start in random.sample(list(ways.items()), len(ways)):
            took[name].append(start())
    base = statistics.median(took["transformers, all experts"])
    print("| | ready after, s | against transformers |\n|---|--:|--:|")
    for name, seconds in took.items():
        middle = statistics.median(seconds)
        print(f"| {name} | {middle:.2f} | {middle / base:.2f} x |", flush=True)


if __name__ == "__main__":
    main()
