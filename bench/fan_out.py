"""What a layer's remote calls cost: ours, what others make of them, and the floor.

    python bench/fan_out.py --model MODEL_DIR

Eight calls of 8 KiB each way at once to one server that computes nothing; as many calls as a layer
could make; one remote layer at decode against a real expert function, its computing subtracted;
one function's rows split over two replicas. What is compared is interleaved in random order:
ratios hold, times depend on who else uses the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import importlib.util
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from main_model_fn.fan_out import FanOut
from main_model_fn.http_transport import HttpTransport
from main_model_fn.metering import StepMeter
from main_model_fn.native_stop import StepBuffers, Stop
from main_model_fn.replica_split import split_over_replicas
from main_model_fn.routes import Batch
from main_model_fn.transport import RemoteResult
from remoe.checkpoint import Checkpoint
from remoe.expert_call import CONTENT_TYPE, MAX_BODY_BYTES, PATH, ExpertCall
from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import Decoding
from remoe.topology import ExpertEndpoint, Topology, socket_url

CALLS = 8
HIDDEN = 2048  # float32: 8 KiB a row
_HEADERS = {"Content-Type": CONTENT_TYPE}

# Each prints where it listens. All answer with 8 KiB of partial sums.
OURS = """
import socket, sys
from expert_fn.endpoint import Endpoint
from expert_fn.server import serve
from remoe.lifecycle import InFlight, Notifier
class Nothing:
    def compute(self, call):
        return bytes(call.rows * 2048 * 4)
if len(sys.argv) > 1:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    url = "unix://" + sys.argv[1]
else:
    listener = socket.create_server(("127.0.0.1", 0))
    url = "http://127.0.0.1:%d" % listener.getsockname()[1]
listener.setblocking(False)
notifier = Notifier(None)
print(url, flush=True)
serve(listener, lambda: Endpoint(Nothing(), notifier), notifier, InFlight(notifier))
"""
UVICORN = """
import socket, uvicorn
async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"8192")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(8192)})
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
config = uvicorn.Config(app, loop="uvloop", http="httptools", lifespan="off", log_level="error",
                        access_log=False, timeout_keep_alive=600)
uvicorn.Server(config).run(sockets=[listener])
"""
# The floor's other end: as many bytes there and back, and nothing done with them.
BARE = """
import asyncio, sys
there, back = int(sys.argv[1]), bytes(int(sys.argv[2]))
class Bare(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.got = transport, 0
    def data_received(self, data):
        self.got += len(data)
        if self.got >= there:
            self.got -= there
            self.transport.write(back)
async def main():
    server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
EXPERT = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, "-m", "expert_fn"])
"""

Exchange = Callable[[], float]  # returns the seconds that a replica computed


@contextlib.contextmanager
def server(code: str, *words: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def expert_functions(model: Path, count: int) -> Iterator[str]:
    """Replicas of the expert function of layer 0 on one socket, as on the local platform; its URL."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as shared:
        path = Path(folder) / "experts.sock"
        shared.bind(str(path))
        shared.listen()
        url = socket_url(path)
        file = Path(folder) / "topology.json"
        topology(url, 1, str(model)).save(file)
        settings = {"REMOE_EXPERT_FIRST_LAYER": "0", "REMOE_EXPERT_LAST_LAYER": "0"}
        settings |= {"REMOE_TOPOLOGY": str(file), "LISTEN_FDS": "1", "REMOE_LOG_LEVEL": "error"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", EXPERT, str(shared.fileno())],
                env=os.environ | settings,
                pass_fds=(shared.fileno(),),
            )
            for _ in range(count)
        ]
        try:
            yield url
        finally:
            for process in processes:
                process.kill()
                process.wait()


def topology(url: str, functions: int, model_dir: str = "") -> Topology:
    return Topology(
        model="bench",
        model_dir=model_dir,
        gateway_url=url,
        planner_url=url,
        main_url=url,
        main_memory_gb=1.0,
        experts=[
            ExpertEndpoint(
                name=f"e{layer}", url=url, first_layer=layer, last_layer=layer, memory_gb=1.0
            )
            for layer in range(functions)
        ],
    )


def eight_kib_call(layer: int) -> ExpertCall:
    return ExpertCall(
        model_digest="bench",
        layer=layer,
        dtype="float32",
        rows=1,
        hidden=bytes(4 * HIDDEN),
        experts=[0],
        offsets=[0, 1],
        row_index=bytes(4),
        gate=bytes(4),
        near=True,
    )


def ours(url: str, count: int = CALLS) -> Exchange:
    # No hedges: a machine that others use too would see some.
    transport = HttpTransport(topology(url, count), timeout_s=30, hedge_floor_s=30)
    calls = [eight_kib_call(layer) for layer in range(count)]

    def exchange() -> float:
        pending = [transport.send(call) for call in calls]
        return sum(reply.result().busy_s for reply in pending)

    return exchange


def stdlib(port: int) -> Exchange:
    """http.client, used as well as it can be: all sent, then all read."""
    connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(CALLS)]
    body = msgspec.msgpack.encode(eight_kib_call(0))

    def exchange() -> float:
        for connection in connections:
            connection.request("POST", PATH, body, _HEADERS)
        for connection in connections:
            with connection.getresponse() as response:
                response.read()
        return 0.0

    return exchange


def through_httpx(port: int, runner: asyncio.Runner, stack: contextlib.ExitStack) -> Exchange:
    body = msgspec.msgpack.encode(eight_kib_call(0))
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)
    stack.callback(lambda: runner.run(client.aclose()))

    async def gather() -> None:
        posts = [client.post(PATH, content=body, headers=_HEADERS) for _ in range(CALLS)]
        for response in await asyncio.gather(*posts):
            assert len(response.content) == 4 * HIDDEN

    return lambda: runner.run(gather()) or 0.0


def through_aiohttp(port: int, runner: asyncio.Runner, stack: contextlib.ExitStack) -> Exchange:
    import aiohttp

    body = msgspec.msgpack.encode(eight_kib_call(0))
    url = f"http://127.0.0.1:{port}{PATH}"

    async def start() -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    session = runner.run(start())
    stack.callback(lambda: runner.run(session.close()))

    async def post() -> None:
        async with session.post(url, data=body, headers=_HEADERS) as response:
            assert len(await response.read()) == 4 * HIDDEN

    async def gather() -> None:
        await asyncio.gather(*[post() for _ in range(CALLS)])

    return lambda: runner.run(gather()) or 0.0


def raw(port: int, there: int, back: int) -> Exchange:
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(CALLS)]
    for connection in sockets:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = bytes(there)

    def exchange() -> float:
        for connection in sockets:
            connection.sendall(request)
        for connection in sockets:
            left = back
            while left:
                left -= len(connection.recv(left))
        return 0.0

    return exchange


class Times(NamedTuple):
    """Milliseconds. A machine that others use too changes the tenth percentile least."""

    p10: float
    p50: float


def measure(paths: dict[str, Exchange], rounds: int) -> dict[str, Times]:
    """What each exchange takes, without the replicas' computing."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds + rounds // 10):
        for name, exchange in random.sample(list(paths.items()), len(paths)):
            began = time.perf_counter()
            busy_s = exchange()
            if number >= rounds // 10:
                times[name].append((time.perf_counter() - began - busy_s) * 1e3)
    return {
        name: Times(statistics.quantiles(values, n=10)[0], statistics.median(values))
        for name, values in times.items()
    }


def compare_clients(rounds: int) -> None:
    body_bytes = len(msgspec.msgpack.encode(eight_kib_call(0)))
    there, back = body_bytes + 150, 4 * HIDDEN + 150
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        uvicorn = int(stack.enter_context(server(UVICORN)))
        bare = int(stack.enter_context(server(BARE, str(there), str(back))))
        path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/ours.sock"
        paths = {
            "ours, as under `remoe up`": ours(stack.enter_context(server(OURS, path))),
            "ours, at a port": ours(stack.enter_context(server(OURS))),
            "http.client, uvicorn": stdlib(uvicorn),
            "httpx gather, uvicorn": through_httpx(uvicorn, runner, stack),
            "floor: raw sockets, bare server": raw(bare, there, back),
        }
        if importlib.util.find_spec("aiohttp"):
            paths["aiohttp gather, uvicorn"] = through_aiohttp(uvicorn, runner, stack)
        times = measure(paths, rounds)
    base = times["http.client, uvicorn"]
    print(f"\n{CALLS} calls of 8 KiB each way, {rounds} rounds")
    for name, (p10, p50) in sorted(times.items(), key=lambda item: item[1].p50):
        ratios = f"{p10 / base.p10:5.2f} and {p50 / base.p50:5.2f} x http.client"
        print(f"  {name:34s} p10 {p10:6.3f}  p50 {p50:6.3f} ms  {ratios}")
    slow, fast = times["httpx gather, uvicorn"], times["ours, as under `remoe up`"]
    print(f"  httpx takes {slow.p10 / fast.p10:.1f} and {slow.p50 / fast.p50:.1f} x ours")


def count_calls(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder, server(OURS, f"{folder}/ours.sock") as url:
        counts = (1, 2, 4, 8, 16, 32)
        times = measure({str(count): ours(url, count) for count in counts}, rounds)
    print(f"\ncalls of 8 KiB each way at once, {rounds} rounds")
    for count, (p10, p50) in times.items():
        each = f"{p10 / int(count) * 1e3:4.0f} and {p50 / int(count) * 1e3:4.0f} us a call"
        print(f"  {count:>2s} p10 {p10:6.3f}  p50 {p50:6.3f} ms  {each}")


def one_layer(model: Path, rounds: int) -> None:
    """From where the kernel stopped to where it goes on: rows gathered, sent, and their sums read."""
    checkpoint = Checkpoint.open(model)
    held = StepBuffers(
        1, checkpoint.hidden_size, torch.bfloat16, layers=1, experts=checkpoint.experts, top_k=2
    )
    held.token[:1], held.expert[:2], held.offsets[:3] = 0, [0, 1], [0, 1, 2]
    held.carried[:], held.row_index[:] = 0, 0
    held.gate_weight.view(np.float32)[:] = 0.5
    step = Decoding(rows=1, elsewhere=held.elsewhere)
    step.elsewhere.rows, step.elsewhere.experts, step.elsewhere.routes = 1, 2, 2
    pool = NativePool()
    with expert_functions(model, 1) as url:
        meter = Busy()
        transport = HttpTransport(topology(url, 1), timeout_s=30, hedge_floor_s=30)
        layer = fan_out(checkpoint, transport, meter)
        stop = Stop(held, step, pool)

        def exchange() -> float:
            rows = stop.elsewhere()
            assert rows is not None
            call = layer.send_gathered(rows, stop.dtype)
            assert call is not None
            partial = layer.receive(call)
            assert partial is not None
            stop.add(partial)
            return meter.busy_s

        p10, p50 = measure({"layer": exchange}, rounds)["layer"]
        transport.close()
    print("\none remote layer at decode, two experts of one row, computing excluded")
    print(f"  p10 {p10:6.3f}  p50 {p50:6.3f} ms")


def splitting(model: Path, rounds: int) -> None:
    """Four experts and as many rows, whole and in two halves for two replicas, both warm."""
    checkpoint = Checkpoint.open(model)
    print("\nrows of 4 experts: one call, two calls to two replicas, computing included")
    now = 0.0
    with expert_functions(model, 2) as url:
        transport = Unsplit(topology(url, 1), timeout_s=30, hedge_floor_s=30, clock=lambda: now)
        layer = fan_out(checkpoint, transport, Busy())

        def exchange(rows: int, split: bool) -> Exchange:
            batch = Batch.of(
                torch.ones(rows, checkpoint.hidden_size, dtype=torch.bfloat16),
                torch.arange(4).repeat(rows, 1),
                torch.full((rows, 4), 0.25, dtype=torch.bfloat16),
            )
            parts = split_over_replicas(batch.routes, 2) if split else [batch.routes]

            def once() -> float:
                sent = [call for part in parts for call in layer.send(batch, part)]
                for call in sent:
                    assert layer.receive(call) is not None
                return 0.0

            return once

        while HttpTransport.replicas(transport, 0) < 2:
            now += 1
            exchange(1, split=False)()
        for rows in (1, 4, 8, 16, 32, 64, 256):
            ways = {"whole": exchange(rows, split=False), "halves": exchange(rows, split=True)}
            whole, halves = measure(ways, rounds).values()
            ratios = f"{halves.p10 / whole.p10:5.2f} and {halves.p50 / whole.p50:5.2f} x"
            print(f"  {rows:4d} p10 {whole.p10:7.3f} {halves.p10:7.3f} ms  {ratios}")
        transport.close()


class Unsplit(HttpTransport):
    """Knows its replicas and keeps it to itself."""

    def replicas(self, layer: int) -> int:
        return 1


class Busy(StepMeter):
    """Knows how long the last call was computed."""

    def __init__(self) -> None:
        super().__init__(layers=1, experts=1, main_memory_gb=1.0)
        self.busy_s = 0.0

    def record_call(self, rows: NDArray[np.intp], result: RemoteResult, memory_gb: float) -> None:
        self.busy_s = result.busy_s


def fan_out(checkpoint: Checkpoint, transport: HttpTransport, meter: StepMeter) -> FanOut:
    return FanOut(
        layer=0,
        model_digest=checkpoint.digest,
        transport=transport,
        function_memory_gb=1.0,
        meter=meter,
        payload_limit_bytes=MAX_BODY_BYTES,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=600)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}")
    compare_clients(args.rounds)
    count_calls(args.rounds)
    one_layer(args.model, 3 * args.rounds)
    splitting(args.model, args.rounds // 4)


if __name__ == "__main__":
    main()
