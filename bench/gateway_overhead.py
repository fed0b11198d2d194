"""What the gateway adds to a request, and how many tokens one gateway process can stream.

    python bench/gateway_overhead.py [--litellm PATH/TO/litellm]

A real gateway process between a client and a main function that answers at once and notes when,
in three processes on loopback. Three loads of 32 clients, each with a connection of its own:

- at the pace of a model, a token every 20 ms, each client asking anew when its answer ends;
- a burst: all 32 ask at the same instant, so that one event loop works them off in a row;
- as fast as tokens go. This is repeated with the HTTP layers of others: that of `transformers
  serve`, with only the model's `generate` replaced, and LiteLLM's proxy, if its command is given,
  in front of an OpenAI server that answers at once.

What is added to the first byte is given twice, less the time from the request's arrival at the main
function to its first token each time: from the request's first byte read by the gateway to the
first byte of its answer written by it, and from the client's request to its first byte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from bench.streaming.clients import Stream, load
from bench.streaming.processes import gateway, running, upstream
from tests.gateway.tiny_text import MODEL, write_model

STREAMS = 32
INTERVAL_S = 0.02
# By request id: when it arrived at the main function, and when its tokens left.
MainTimes = dict[str, tuple[float, list[float]]]
# By reply id: when its request's first byte was read, and when its own first byte was written.
GatewayTimes = dict[str, tuple[float, float]]


def overhead(folder: Path, *, rounds: int) -> None:
    """At a model's pace: what is added to the first token and to each further one."""
    noted = folder / "times.json"
    with ExitStack() as stack:
        behind = stack.enter_context(upstream(folder, interval_s=INTERVAL_S)).port
        watched = gateway(
            MODEL, folder, behind, module="bench.streaming.stopwatch", BENCH_TIMES=str(noted)
        )
        ours = stack.enter_context(watched)
        load(ours.port, MODEL, clients=STREAMS, rounds=2, tokens=[1], spread_s=1)
        before = ours.cpu_s()
        alone = load(ours.port, MODEL, clients=STREAMS, rounds=rounds, tokens=[1], spread_s=1)
        request_s = (ours.cpu_s() - before) / len(alone)
        get(behind, "/times")
        before = ours.cpu_s()
        # Of different lengths, or those that once came together would always.
        lengths = range(32, 97)
        spread_s = 64 * INTERVAL_S
        steady = load(
            ours.port, MODEL, clients=STREAMS, rounds=rounds, tokens=lengths, spread_s=spread_s
        )
        used_s = ours.cpu_s() - before
        bursts = [
            load(ours.port, MODEL, clients=STREAMS, rounds=1, tokens=[8]) for _ in range(rounds)
        ]
        in_main: MainTimes = json.loads(get(behind, "/times"))
    in_gateway: GatewayTimes = json.loads(noted.read_text())  # written as it ended
    chunks = sum(stream.tokens - 1 for stream in steady)
    chunk_s = (used_s - request_s * len(steady)) / chunks
    print(f"{STREAMS} streams, a token every 20 ms, {len(steady)} answers of 32 to 96 tokens")
    show("time in gateway - in main", beyond_main_ms(steady, in_gateway, in_main))
    show("  until main has it", before_main_ms(steady, in_gateway, in_main))
    show("  after its first token", after_main_ms(steady, in_gateway, in_main))
    show("added at the client", added_ms(steady, in_main))
    show("added to a further chunk", further_ms(steady, in_main))
    print(
        f"  CPU time                   {request_s * 1e3:.2f} ms a request, "
        f"{chunk_s * 1e3:.3f} ms a further chunk"
    )
    print(f"{STREAMS} at the same instant, {rounds} times")
    burst = [one for some in bursts for one in some]
    show("time in gateway - in main", beyond_main_ms(burst, in_gateway, in_main))
    show("added at the client", added_ms(burst, in_main))


def before_main_ms(
    streams: list[Stream], in_gateway: GatewayTimes, in_main: MainTimes
) -> list[float]:
    """From the request's first byte read by the gateway to the first one read by main."""
    return [(in_main[f"{one.id}-0"][0] - in_gateway[one.id][0]) * 1e3 for one in streams]


def after_main_ms(
    streams: list[Stream], in_gateway: GatewayTimes, in_main: MainTimes
) -> list[float]:
    """From main's first token to the answer's first byte written by the gateway."""
    return [(in_gateway[one.id][1] - in_main[f"{one.id}-0"][1][0]) * 1e3 for one in streams]


def beyond_main_ms(
    streams: list[Stream], in_gateway: GatewayTimes, in_main: MainTimes
) -> list[float]:
    """Time in the gateway, from the request's first byte to the answer's, less that in main."""
    before = before_main_ms(streams, in_gateway, in_main)
    after = after_main_ms(streams, in_gateway, in_main)
    return [sum(parts) for parts in zip(before, after, strict=True)]


def added_ms(streams: list[Stream], in_main: MainTimes) -> list[float]:
    """The client's wait for the first byte, less the time in main."""
    added = []
    for stream in streams:
        arrived, sent = in_main[f"{stream.id}-0"]
        added.append((stream.first_byte - stream.asked - (sent[0] - arrived)) * 1e3)
    return added


def further_ms(streams: list[Stream], in_main: MainTimes) -> list[float]:
    """The way of each token after the first, from main to the client."""
    return [
        (received - sent) * 1e3
        for stream in streams
        for received, sent in list(zip(stream.chunks, in_main[f"{stream.id}-0"][1], strict=True))[
            1:
        ]
    ]


def show(what: str, values_ms: list[float]) -> None:
    cuts = statistics.quantiles(values_ms, n=100, method="inclusive")
    print(f"  {what:25}  p50 {cuts[49]:6.2f} ms   p99 {cuts[98]:6.2f} ms")


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as reply:
        body: bytes = reply.read()
        return body


def tokens_per_s(port: int, model: str, *, tokens: int) -> float:
    started = time.perf_counter()
    streams = load(port, model, clients=STREAMS, rounds=1, tokens=[tokens])
    ended = max(stream.chunks[-1] for stream in streams)
    return sum(stream.tokens for stream in streams) / (ended - started)


def throughput(folder: Path, litellm: str | None, *, repeats: int, tokens: int) -> None:
    """As fast as they go, all in one run, by turns."""
    with ExitStack() as stack:
        behind = stack.enter_context(upstream(folder, interval_s=0)).port
        serve = (sys.executable, "-m", "bench.streaming.transformers_serve", str(folder))
        peers = {
            "Remoe's gateway": (stack.enter_context(gateway(MODEL, folder, behind)).port, MODEL),
            "transformers serve's HTTP layer": (stack.enter_context(running(*serve)).port, "m"),
        }
        if litellm is None:
            print("  (LiteLLM's proxy is left out: no --litellm)")
        else:
            command, variables = litellm_proxy(litellm, folder, behind)
            started = running(*command, prints_port=False, **variables)
            peers["LiteLLM's proxy"] = (stack.enter_context(started).port, "m")
        speeds: dict[str, list[float]] = {name: [] for name in peers}
        for port, model in peers.values():
            tokens_per_s(port, model, tokens=16)
        for _ in range(repeats):
            for name, (port, model) in random.sample(list(peers.items()), len(peers)):
                # The slower get less to do, or they would take the whole run.
                scaled = tokens if name != "LiteLLM's proxy" else tokens // 4
                speeds[name].append(tokens_per_s(port, model, tokens=scaled))
    ours = statistics.median(speeds["Remoe's gateway"])
    print(f"{STREAMS} streams as fast as they go, median of {repeats}")
    for name, found in speeds.items():
        speed = statistics.median(found)
        print(f"  {name:34} {speed:9,.0f} tokens/s   ours is {ours / speed:5.2f} x")


def litellm_proxy(
    litellm: str, folder: Path, behind: int
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Its command and environment, in front of the OpenAI server on the port `behind`."""
    config = folder / "litellm.yaml"
    target = {
        "model": "openai/m",
        "api_base": f"http://127.0.0.1:{behind}/v1",
        "api_key": "x",
    }
    config.write_text(json.dumps({"model_list": [{"model_name": "m", "litellm_params": target}]}))
    command = (litellm, "--config", str(config), "--port", "{port}", "--num_workers", "1")
    return command, {
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        # It ends streams that say the same again and again, as this one does.
        "REPEATED_STREAMING_CHUNK_LIMIT": "100000",
        "PYTHONPATH": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--litellm", help="LiteLLM's command, from an environment of its own")
    parser.add_argument(
        "--rounds", type=int, default=20, help="answers a stream, at a model's pace"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each, as fast as they go")
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        overhead(folder, rounds=arguments.rounds)
        if arguments.repeats:
            throughput(folder, arguments.litellm, repeats=arguments.repeats, tokens=960)


if __name__ == "__main__":
    main()
