"""What the gateway adds to a request, and how many tokens one gateway process can stream.

    python bench/gateway_overhead.py [--litellm PATH/TO/litellm]

A real gateway process between a client and a main function that answers at once and notes when,
in three processes on loopback. Three loads of 32 clients, each with a connection of its own:

- at the pace of a model, a token every 20 ms, each client asking anew when its answer ends;
- a burst: all 32 ask at the same instant, so that one event loop works them off in a row;
- as fast as tokens go. This is repeated with the HTTP layers of others: that of `transformers
  serve`, with only the model's `generate` replaced, and LiteLLM's proxy, if its command is given,
  in front of an OpenAI server that answers at once.

What is added to the first byte is the time from the client's request to its first byte, less the
time from the request's arrival at the main function to its first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import psutil
import uvloop

from remoe.topology import Topology
from tests.gateway.tiny_text import MODEL, write_model

STREAMS = 32
PROMPT = "The capital of France"
MARK = b" processes"

# What answers at once: the main function's and the planner's protocols, and OpenAI's.
UPSTREAM = r"""
import asyncio, json, re, socket, sys, time
import msgspec, uvloop
from remoe.experts import Partition
from remoe.generation import GenerateEvent, GenerationStats
from remoe.ledger import Ledger
from remoe.plan import Plan
from tokenizers import Tokenizer

interval_s, tokenizer = float(sys.argv[1]), Tokenizer.from_file(sys.argv[2])
token = tokenizer.encode(" processes").ids[0]
line = msgspec.json.encode(GenerateEvent(tokens=[token])) + b"\n"
stats = GenerationStats(queue_s=0, first_token_s=0, total_s=0, prompt_tokens=4, output_tokens=1,
    deployment_plan_id="d", ledger=Ledger(), prefill_counts=[[4, 0]], decode_counts=[[0, 1]])
end = msgspec.json.encode(GenerateEvent(finish="length", stats=stats)) + b"\n"
plan = msgspec.json.encode(Plan(plan_id="p", model="m", model_digest="d",
    partition=Partition(experts=2, remote=((1,),)), profile=[[0.5, 0.5]], main_memory_gb=1.0,
    functions=[], prewarm=[], neighbours=[], predicted_ttft_s=0.5, predicted_tpot_s=0.1,
    predicted_cost_usd=0.001))
chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m",
    "choices": [{"index": 0, "delta": {"content": " processes"}, "finish_reason": None}]}
sse = b"data: " + json.dumps(chunk).encode() + b"\n\n"
chunk["choices"][0] = {"index": 0, "delta": {}, "finish_reason": "length"}
sse_end = b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
times = {}

def chunked(body):
    return b"%x\r\n%b\r\n" % (len(body), body)

class Server(asyncio.Protocol):
    # Bare, so that what it takes itself is little, and is not counted as the gateway's.
    def connection_made(self, transport):
        self.transport, self.buffer, self.paused, self.go_on = transport, b"", False, None

    def pause_writing(self):
        self.paused = True

    def resume_writing(self):
        self.paused = False
        if self.go_on:
            self.go_on()

    def data_received(self, data):
        if not self.buffer:
            self.arrived = time.perf_counter()
        self.buffer += data
        head, ended, rest = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        body = rest[: int(length[1]) if length else 0]
        if not ended or (length and len(body) < int(length[1])):
            return
        self.buffer = b""
        path = head.split(b" ")[1].decode()
        if path in ("/v1/generate", "/v1/chat/completions"):
            self.answer(json.loads(body), ours=path == "/v1/generate")
            return
        reply = plan if path == "/v1/plan" else b"{}"
        if path == "/times":
            reply = json.dumps(times).encode()
            times.clear()
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(reply) + reply)

    def answer(self, asked, ours):
        loop, write, arrived = asyncio.get_running_loop(), self.transport.write, self.arrived
        kind = b"application/x-ndjson" if ours else b"text/event-stream"
        write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"
            b"transfer-encoding: chunked\r\n\r\n" % kind)
        left = asked["max_new_tokens"] if ours else asked["max_tokens"]
        part, last = (line, end) if ours else (sse, sse_end)
        sent = []
        if interval_s:
            times[asked["request_id"]] = [arrived, sent]

        def step():
            nonlocal left
            self.go_on = step if self.paused else None
            if self.paused:
                return
            # As fast as it goes, eight tokens a write: the source must not be what is measured.
            count = 1 if interval_s else min(8, left)
            left -= count
            sent.append(time.perf_counter())
            write(chunked(part * count))
            if not left:
                write(chunked(last) + b"0\r\n\r\n")
            elif interval_s:
                due = arrived + interval_s * (len(sent) + 1)
                loop.call_later(max(0, due - time.perf_counter()), step)
            else:
                loop.call_soon(step)

        loop.call_later(interval_s, step)

async def serve():
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    server = await asyncio.get_running_loop().create_server(Server, sock=listener)
    await server.serve_forever()

uvloop.run(serve())
"""

# `transformers serve`, whole but for the model: its server, handler, generation manager, streamer.
TRANSFORMERS = r"""
import logging, socket, sys
import torch, uvicorn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality

folder = sys.argv[1]
logging.disable(logging.WARNING)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
tokenizer.chat_template = open(folder + "/chat_template.jinja").read()
token = torch.tensor([tokenizer.encode(" processes")[0]])

class Model:
    device, dtype = torch.device("cpu"), torch.float32
    config = type("Config", (), {"model_type": "llama"})()
    generation_config = GenerationConfig(eos_token_id=0)

    def generate(self, *, streamer, generation_config, **rest):
        streamer.put(rest["input_ids"])
        for _ in range(generation_config.max_new_tokens):
            streamer.put(token)
        streamer.end()

class Manager:
    def shutdown(self): pass
    def get_model_modality(self, model, processor=None): return Modality.LLM

class Handler(ChatCompletionHandler):
    def _resolve_model(self, body): return "m", Model(), tokenizer

state = GenerationState(continuous_batching=False)
handler = Handler(model_manager=Manager(), generation_state=state)
app = build_server(Manager(), handler, None, None, None, None, state)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listener])
"""


@contextmanager
def running(*command: str, prints_port: bool = True, **variables: str) -> Iterator[tuple[int, int]]:
    """A helper process: its port and its process id."""
    port = free_port()
    process = subprocess.Popen(
        [str(port) if word == "{port}" else word for word in command],
        stdout=subprocess.PIPE if prints_port else subprocess.DEVNULL,
        stderr=None if prints_port else subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PORT": str(port), **variables},
    )
    try:
        if prints_port:
            assert process.stdout is not None
            port = int(process.stdout.readline())
        wait_for(port, process)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        assert process.poll() is None, "a helper process ended at once"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(process.args)


@dataclass
class Stream:
    """What a client saw of one answer; times are of the clock all processes share."""

    id: str = ""
    asked: float = 0.0
    first_byte: float = 0.0
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0


class Client(asyncio.Protocol):
    """One kept-alive connection, read with as little work as can be."""

    transport: asyncio.WriteTransport
    stream: Stream
    ended: asyncio.Future[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's has no such base

    async def ask(self, model: str, tokens: int) -> Stream:
        """One streamed chat completion."""
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": tokens,
            "stream": True,
        }
        body = json.dumps(asked).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer sk-x\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.ended = asyncio.get_running_loop().create_future()
        self.tail = b""
        self.stream = Stream(asked=time.perf_counter())
        self.transport.write(head.encode() + body)
        await self.ended
        assert self.stream.tokens == tokens, (self.stream.tokens, tokens)
        return self.stream

    def data_received(self, data: bytes) -> None:
        now, stream = time.perf_counter(), self.stream
        if not stream.first_byte:
            assert data.startswith(b"HTTP/1.1 200"), data[:500]
            stream.first_byte = now
        if not stream.id and (at := data.find(b'"id":')) >= 0:
            stream.id = data[at + 5 :].split(b'"')[1].decode()
        # One mark a token, whatever order a server gives its keys; a mark may be cut in two.
        count = (self.tail + data).count(MARK)
        self.tail = data[1 - len(MARK) :]
        stream.tokens += count
        stream.chunks += [now] * count
        if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server hung up"))


def load(
    port: int, model: str, *, rounds: int, tokens: Sequence[int], spread_s: float
) -> list[Stream]:
    """32 clients that ask `rounds` times each, one answer after the other, for any of `tokens`."""

    async def one(client: Client) -> list[Stream]:
        await asyncio.sleep(random.random() * spread_s)
        return [await client.ask(model, random.choice(tokens)) for _ in range(rounds)]

    async def all_of_them() -> list[Stream]:
        loop = asyncio.get_running_loop()
        clients = [
            (await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(STREAMS)
        ]
        done = await asyncio.gather(*map(one, clients))
        for client in clients:
            client.transport.close()
        return [stream for streams in done for stream in streams]

    return uvloop.run(all_of_them())


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def gateway(folder: Path, upstream: int) -> Iterator[tuple[int, int]]:
    url = f"http://127.0.0.1:{upstream}"
    path = folder / f"topology-{upstream}.json"
    Topology(
        model=MODEL,
        model_dir=str(folder),
        gateway_url="http://127.0.0.1:1",
        planner_url=url,
        main_url=url,
        main_memory_gb=1.0,
        experts=[],
    ).save(path)
    with running(
        *(sys.executable, "-m", "gateway"),
        prints_port=False,
        REMOE_TOPOLOGY=str(path),
        REMOE_LOG_LEVEL="warning",
        REMOE_GATEWAY_AUTH="off",  # it binds every address
    ) as started:
        yield started


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def overhead(folder: Path, *, rounds: int) -> None:
    """At a model's pace: what is added to the first token and to each further one."""
    with ExitStack() as stack:
        tokenizer = str(folder / "tokenizer.json")
        upstream, _ = stack.enter_context(
            running(sys.executable, "-c", UPSTREAM, "0.02", tokenizer)
        )
        port, pid = stack.enter_context(gateway(folder, upstream))
        load(port, MODEL, rounds=2, tokens=[1], spread_s=1)
        before = cpu_s(pid)
        alone = load(port, MODEL, rounds=rounds, tokens=[1], spread_s=1)
        request_s = (cpu_s(pid) - before) / len(alone)
        get(upstream, "/times")
        before = cpu_s(pid)
        # Of different lengths, or those that once came together would always.
        steady = load(port, MODEL, rounds=rounds, tokens=range(32, 97), spread_s=1.28)
        used_s = cpu_s(pid) - before
        steady_times = json.loads(get(upstream, "/times"))
        bursts = [load(port, MODEL, rounds=1, tokens=[8], spread_s=0) for _ in range(rounds)]
        burst_times = json.loads(get(upstream, "/times"))
    first, further = added_ms(steady, steady_times)
    chunks = sum(stream.tokens - 1 for stream in steady)
    chunk_s = (used_s - request_s * len(steady)) / chunks
    print(f"{STREAMS} streams, a token every 20 ms, {len(steady)} answers of 32 to 96 tokens")
    show("added to the first byte", first)
    show("added to a further chunk", further)
    print(
        f"  CPU time                   {request_s * 1e3:.2f} ms a request, "
        f"{chunk_s * 1e3:.3f} ms a further chunk"
    )
    print(f"{STREAMS} at the same instant, {rounds} times")
    show(
        "added to the first byte",
        added_ms([one for some in bursts for one in some], burst_times)[0],
    )


def added_ms(
    streams: list[Stream], times: dict[str, tuple[float, list[float]]]
) -> tuple[list[float], list[float]]:
    """What the way through the gateway added to first bytes, and to each chunk after them."""
    first, further = [], []
    for stream in streams:
        arrived, sent = times[f"{stream.id}-0"]
        first.append((stream.first_byte - stream.asked - (sent[0] - arrived)) * 1e3)
        pairs = zip(stream.chunks, sent, strict=True)
        further += [(received - at) * 1e3 for received, at in list(pairs)[1:]]
    return first, further


def show(what: str, values_ms: list[float]) -> None:
    p50, p99 = percentile(values_ms, 0.5), percentile(values_ms, 0.99)
    print(f"  {what:25}  p50 {p50:6.2f} ms   p99 {p99:6.2f} ms")


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as reply:
        body: bytes = reply.read()
        return body


def tokens_per_s(port: int, model: str, *, tokens: int) -> float:
    started = time.perf_counter()
    streams = load(port, model, rounds=1, tokens=[tokens], spread_s=0)
    ended = max(stream.chunks[-1] for stream in streams)
    return sum(stream.tokens for stream in streams) / (ended - started)


def throughput(folder: Path, litellm: str | None, *, repeats: int, tokens: int) -> None:
    """As fast as they go, all in one run, by turns."""
    with ExitStack() as stack:
        tokenizer = str(folder / "tokenizer.json")
        upstream, _ = stack.enter_context(running(sys.executable, "-c", UPSTREAM, "0", tokenizer))
        peers = {
            "Remoe's gateway": (stack.enter_context(gateway(folder, upstream))[0], MODEL),
            "transformers serve's HTTP layer": (
                stack.enter_context(running(sys.executable, "-c", TRANSFORMERS, str(folder)))[0],
                "m",
            ),
        }
        if litellm is None:
            print("  (LiteLLM's proxy is left out: no --litellm)")
        else:
            config = folder / "litellm.yaml"
            target = {
                "model": "openai/m",
                "api_base": f"http://127.0.0.1:{upstream}/v1",
                "api_key": "x",
            }
            config.write_text(
                json.dumps({"model_list": [{"model_name": "m", "litellm_params": target}]})
            )
            command = (litellm, "--config", str(config), "--port", "{port}", "--num_workers", "1")
            variables = {
                "LITELLM_LOG": "ERROR",
                "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
                # It ends streams that say the same again and again, as this one does.
                "REPEATED_STREAMING_CHUNK_LIMIT": "100000",
                "PYTHONPATH": "",
            }
            started = running(*command, prints_port=False, **variables)
            peers["LiteLLM's proxy"] = (stack.enter_context(started)[0], "m")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--litellm", help="LiteLLM's command, from an environment of its own")
    parser.add_argument(
        "--rounds", type=int, default=20, help="answers a stream, at a model's pace"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each, as fast as they go")
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        overhead(folder, rounds=arguments.rounds)
        throughput(folder, arguments.litellm, repeats=arguments.repeats, tokens=960)


if __name__ == "__main__":
    main()
