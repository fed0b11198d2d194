"""Decoding speed of one model on this machine: Remoe's main function against transformers.

    python bench/decode.py --threads 2

Each contender runs in a process of its own on the first `--threads` processors, one after another:
`generate`, transformers' continuous batching, and Remoe with all experts here and with half of
them in real expert functions on the same processors; and llama.cpp on the same weights, if its
library is there (bench/llama_peer.py). Prompts are random tokens, so routes are as
spread as they get. The floor is the bytes of one token's weights over the memory's measured rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from remoe.checkpoint import Checkpoint
    from remoe.topology import Topology

_PROMPT, _LONG, _TOKENS = 40, 128, 48


def bandwidth_bytes_per_s(threads: int) -> float:
    """What so many threads read of memory that no cache holds, at best."""
    data = np.ones(600_000_000 // 8, np.uint64)
    parts = np.array_split(data, threads)

    def once() -> float:
        readers = [threading.Thread(target=part.max) for part in parts]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return data.nbytes / (time.perf_counter() - began)

    return max(once() for _ in range(5))


def token_bytes(model_dir: Path) -> int:
    """Weights that one decoded token reads: all but the experts and the embedding, and top-k."""
    from remoe.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model_dir)
    experts = len(checkpoint.moe_layers) * checkpoint.top_k * checkpoint.expert_size_bytes
    return experts + checkpoint.non_expert_size_bytes


def random_prompt(seed: int, length: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(5, 40_000, length).tolist()
    return tokens


def run_generate(model_dir: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    starts: list[float] = []
    model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()), with_kwargs=True)
    how = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    steps = []
    for seed in range(3):
        starts.clear()
        model.generate(torch.tensor([random_prompt(seed, _PROMPT)]), **how)
        steps += np.diff(starts[1:]).tolist()
    first = []
    for seed in range(4):
        began = time.perf_counter()
        model.generate(torch.tensor([random_prompt(seed, _LONG)]), max_new_tokens=1)
        first.append(time.perf_counter() - began)
    return {"one": 1 / statistics.median(steps), "first_s": statistics.median(first)}


def run_continuous(model_dir: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=64, max_batch_tokens=256, max_requests_per_batch=8
    )
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=config,
    )
    manager.start()
    rates = {}
    for name, streams in (("warm", 1), ("one", 1), ("eight", 8)):
        began = time.perf_counter()
        for seed in range(streams):
            manager.add_request(random_prompt(seed, _PROMPT), max_new_tokens=_TOKENS)
        done = 0
        while done < streams:
            result = manager.get_result(timeout=60)
            done += result is not None and result.is_finished()
        rates[name] = streams * _TOKENS / (time.perf_counter() - began)
    manager.stop(block=True)
    return {"one": rates["one"], "eight": rates["eight"]}


def run_remoe(model_dir: Path, share: float) -> dict[str, float]:
    import torch

    from main_model_fn.engine import Engine, EngineLimits
    from main_model_fn.http_transport import HttpTransport
    from main_model_fn.metering import StepMeter
    from main_model_fn.served_model import load_served_model
    from remoe.checkpoint import Checkpoint
    from remoe.experts import Partition
    from remoe.generation import GenerateRequest, SamplingParams
    from remoe.kernel.native_library import NativePool

    torch.set_num_threads(1)  # as main_model_fn/native_threads.py does
    checkpoint = Checkpoint.open(model_dir)
    remote = tuple(range(round(checkpoint.experts * share)))
    partition = Partition(
        experts=checkpoint.experts,
        remote=tuple(
            remote if layer in checkpoint.moe_layers else () for layer in range(checkpoint.layers)
        ),
    )
    meter = StepMeter(layers=checkpoint.layers, experts=checkpoint.experts, main_memory_gb=1)
    with expert_functions(checkpoint, model_dir) as topology:
        model = load_served_model(
            model_dir,
            partition=partition,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            transport=HttpTransport(topology, timeout_s=10),
            function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 1.0),
            meter=meter,
            pool=NativePool(threads=len(os.sched_getaffinity(0)), spins=2000),
        )
        limits = EngineLimits(
            kv_tokens=4096, page_tokens=32, batch_tokens=256, max_requests=8, max_queue=64
        )
        engine = Engine(model, meter, limits=limits, deployment_plan_id="bench")
        engine.start()

        async def stream(seed: int, length: int, tokens: int) -> tuple[list[float], float]:
            request = GenerateRequest(
                request_id="bench",
                plan_id=None,
                prompt_tokens=random_prompt(seed, length),
                max_new_tokens=tokens,
                stop_tokens=[],
                sampling=SamplingParams(temperature=0),
            )
            times, first_s = [], 0.0
            async for event in engine.generate(request):
                times.append(time.perf_counter())
                first_s = event.stats.first_token_s if event.stats else 0.0
            return times, first_s

        async def streams(count: int, length: int, tokens: int, seed: int) -> list[list[float]]:
            jobs = (stream(seed + i, length, tokens) for i in range(count))
            return [times for times, _ in await asyncio.gather(*jobs)]

        asyncio.run(streams(1, _PROMPT, _TOKENS, 100))
        steps = []
        for seed in range(3):
            (times,) = asyncio.run(streams(1, _PROMPT, _TOKENS, seed))
            steps += np.diff(times).tolist()
        began = time.perf_counter()
        asyncio.run(streams(8, _PROMPT, _TOKENS, 200))
        eight = 8 * _TOKENS / (time.perf_counter() - began)
        first = [asyncio.run(stream(300 + i, _LONG, 1))[1] for i in range(4)]
        engine.stop()
    return {
        "one": 1 / statistics.median(steps),
        "eight": eight,
        "first_s": statistics.median(first),
    }


def run_llama(model_dir: Path) -> dict[str, float]:
    from llama_peer import run_llama_cpp

    prompts = [random_prompt(seed, _PROMPT) for seed in range(3)]
    long = [random_prompt(seed, _LONG) for seed in range(4)]
    return run_llama_cpp(model_dir, prompts, long, _TOKENS)


@contextmanager
def expert_functions(checkpoint: Checkpoint, model_dir: Path) -> Iterator[Topology]:
    """One expert function for all layers, as the local platform would start it."""
    from remoe.cli.hardware.functions import FunctionProcess, layers_env

    env = {
        **layers_env(checkpoint),
        # Both on all processors: either computes while the other waits, or leaves it half.
        "REMOE_EXPERT_THREADS": str(len(os.sched_getaffinity(0))),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        FunctionProcess("expert_fn", model_dir, Path(folder), env) as function,
    ):
        function.start()
        yield function.topology


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, help="default: the built default model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=["generate", "continuous", "llama", "local", "half"])
    args = parser.parse_args()
    import llama_peer

    from remoe.cli.model import built_model

    model_dir = args.model_dir or built_model()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.child:
        runs = {
            "generate": run_generate,
            "continuous": run_continuous,
            "llama": run_llama,
            "local": lambda folder: run_remoe(folder, 0.0),
            "half": lambda folder: run_remoe(folder, 0.5),
        }
        print(json.dumps(runs[args.child](model_dir)))
        return
    rate, needed = bandwidth_bytes_per_s(args.threads), token_bytes(model_dir)
    print(
        f"{args.threads} processors read {rate / 1e9:.1f} GB/s; a token needs {needed / 1e6:.0f} "
        f"MB of weights: at most {rate / needed:.1f} tokens/s alone\n"
    )
    print("| | one stream, tokens/s | of the floor | eight streams, tokens/s | first of 128, ms |")
    print("|---|--:|--:|--:|--:|")
    names = {
        "generate": "transformers `generate`",
        "continuous": "transformers continuous batching",
        "local": "Remoe, all experts here",
        "half": "Remoe, half of them remote",
    }
    if llama_peer.available():
        names["llama"] = "llama.cpp, the same weights"
    for child, name in names.items():
        command = [sys.executable, __file__, "--child", child, "--model-dir", str(model_dir)]
        done = subprocess.run(
            [*command, "--threads", str(args.threads)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [f"{found['one']:.1f}", f"{found['one'] * needed / rate:.0%}"]
        cells.append(f"{found['eight']:.1f}" if "eight" in found else "")
        cells.append(f"{found['first_s'] * 1000:.0f}" if "first_s" in found else "")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
