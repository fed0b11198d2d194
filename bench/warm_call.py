"""What one warm remote call costs, and what a proxy in between would add.

    python bench/warm_call.py --model MODEL_DIR

One row for one expert, kept-alive connections, loopback; all paths interleaved in random order in
one run, since the order alone can turn the result. The expert's own computing time is subtracted.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import numpy as np

from main_model_fn.http_transport import HttpTransport
from remoe.checkpoint import Checkpoint
from remoe.expert_call import CONTENT_TYPE, PATH, ExpertCall, ExpertReply
from remoe.topology import ExpertEndpoint, Topology


def one_row_call(checkpoint: Checkpoint) -> ExpertCall:
    hidden = np.ones(checkpoint.hidden_size, "<f4")
    return ExpertCall(
        model_digest=checkpoint.digest,
        layer=0,
        dtype="float32",
        rows=1,
        hidden=hidden.tobytes(),
        experts=[0],
        offsets=[0, 1],
        row_index=np.zeros(1, "<i4").tobytes(),
        gate=np.ones(1, "<f4").tobytes(),
    )


def start(code: str, *words: str) -> tuple[subprocess.Popen[str], int]:
    """A helper process that prints its port."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


# What a proxy at its cheapest does: copy bytes both ways, without reading HTTP.
RELAY = """
import asyncio, sys
async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
async def serve(reader, writer):
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
# The floor: as many bytes there and back, and nothing done with them.
ECHO = """
import asyncio, sys
there, back = int(sys.argv[1]), bytes(int(sys.argv[2]))
class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.got = transport, 0
    def data_received(self, data):
        self.got += len(data)
        if self.got >= there:
            self.got -= there
            self.transport.write(back)
async def main():
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def topology_of(model_dir: Path, port: int) -> Topology:
    url = f"http://127.0.0.1:{port}"
    endpoint = ExpertEndpoint(name="e", url=url, first_layer=0, last_layer=0, memory_gb=1.0)
    return Topology(
        model="bench",
        model_dir=str(model_dir),
        gateway_url=url,
        planner_url=url,
        main_url=url,
        main_memory_gb=1.0,
        experts=[endpoint],
    )


def raw_exchange(port: int, there: int, back: int) -> Callable[[], float]:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = bytes(there)

    def exchange() -> float:
        connection.sendall(request)
        left = back
        while left:
            left -= len(connection.recv(left))
        return 0.0

    return exchange


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    call = one_row_call(Checkpoint.open(args.model))
    body = msgspec.msgpack.encode(call)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        topology_file = Path(folder) / "topology.json"
        topology_of(args.model, port).save(topology_file)
        settings = {"REMOE_EXPERT_FIRST_LAYER": "0", "REMOE_EXPERT_LAST_LAYER": "0"}
        expert = subprocess.Popen(
            [sys.executable, "-m", "expert_fn"],
            env=os.environ | settings | {"REMOE_TOPOLOGY": str(topology_file), "PORT": str(port)},
        )
        relay, relay_port = start(RELAY, str(port))
        echo, echo_port = start(ECHO, str(len(body) + 150), str(len(call.hidden) + 200))
        try:
            asyncio.run(wait_for(port))
            direct = HttpTransport(topology_of(args.model, port), timeout_s=10)
            proxied = HttpTransport(topology_of(args.model, relay_port), timeout_s=10)
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}")

            def through_httpx() -> float:
                reply = client.post(PATH, content=body, headers={"Content-Type": CONTENT_TYPE})
                return msgspec.msgpack.decode(reply.content, type=ExpertReply).busy_s

            paths: dict[str, Callable[[], float]] = {
                "ours": lambda: direct.send(call).result().busy_s,
                "ours through a byte relay": lambda: proxied.send(call).result().busy_s,
                "httpx": through_httpx,
                "floor, raw bytes": raw_exchange(
                    echo_port, len(body) + 150, len(call.hidden) + 200
                ),
            }
            report(measure(paths, args.rounds))
        finally:
            for process in (expert, relay, echo):
                process.kill()
                process.wait()


async def wait_for(port: int) -> None:
    """Until the expert function answers."""
    for _ in range(500):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/readyz")
            connection.getresponse().read()
        except OSError:
            await asyncio.sleep(0.02)
        else:
            return
    raise SystemExit("the expert function did not start")


def measure(paths: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each exchange, without the expert's computing."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds + 100):
        for name, exchange in random.sample(list(paths.items()), len(paths)):
            began = time.perf_counter()
            busy_s = exchange()
            if number >= 100:
                times[name].append((time.perf_counter() - began - busy_s) * 1e3)
    return times


def report(times: dict[str, list[float]]) -> None:
    floor = statistics.median(times["floor, raw bytes"])
    print(f"{os.cpu_count()} cores, {platform.machine()}, {len(next(iter(times.values())))} rounds")
    for name, values in times.items():
        p50, p99 = statistics.median(values), statistics.quantiles(values, n=100)[98]
        print(f"{name:28s} p50 {p50:6.3f} ms  p99 {p99:6.3f} ms  {p50 / floor:5.1f} x floor")


if __name__ == "__main__":
    main()
