"""What the ledger costs: two gateways, one that writes it and one that does not, in turns.

    python bench/metering.py --model DIR [--rounds 20] [--tokens 64] [--postgresql URL]

Both have the same fake main function behind them, which streams tokens as fast as it can. A round
sends the same streams to one gateway and then to the other; the ratio of their processor time and
of their wall time is taken round by round, and the median of rounds is printed: the machine's
moods cancel out, and a second gateway without a ledger shows how far they do. The target is 1.03 at most (processor time).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import msgspec
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from remoe.accounts.database import open_database
from remoe.accounts.entries import Entry
from remoe.accounts.writer import LedgerWriter
from remoe.generation import GenerateEvent, GenerateRequest, GenerationStats
from remoe.ledger import Ledger
from remoe.topology import Topology

_STREAMS = 32
_TOKEN = 300
_ENTRY = msgspec.convert(
    {
        field.name: {int: 1, str: "bench", bool: True}.get(field.type)
        for field in msgspec.structs.fields(Entry)
    }
    | {"outcome": "finished"},
    Entry,
)


async def _generate(request: Request) -> Response:
    asked = msgspec.json.decode(await request.body(), type=GenerateRequest)
    return StreamingResponse(_events(asked), media_type="application/x-ndjson")


async def _events(asked: GenerateRequest) -> AsyncIterator[bytes]:
    counts = [[1] * 8] * 30
    line = msgspec.json.encode(GenerateEvent(tokens=[_TOKEN])) + b"\n"
    for _ in range(asked.max_new_tokens):
        yield line
        await asyncio.sleep(0)
    stats = GenerationStats(
        queue_s=0.0,
        first_token_s=0.1,
        total_s=1.0,
        prompt_tokens=len(asked.prompt_tokens),
        output_tokens=asked.max_new_tokens,
        deployment_plan_id="fake",
        ledger=Ledger(main_cpu_gb_s=1.5, remote_gb_s=0.5, remote_calls=100),
        prefill_counts=counts,
        decode_counts=counts,
    )
    yield msgspec.json.encode(GenerateEvent(finish="length", stats=stats)) + b"\n"


def _serve_fake(port: int) -> None:
    app = Starlette(routes=[Route("/v1/generate", _generate, methods=["POST"])])
    uvicorn.run(app, port=port, log_config=None, access_log=False)


@contextmanager
def _process(*arguments: str, env: dict[str, str], port: int) -> Iterator[psutil.Process]:
    child = subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, **env}, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if child.poll() is not None:
                    sys.exit(f"{arguments} ended with status {child.returncode}")
                time.sleep(0.05)
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(timeout=20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def _stream(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> None:
    async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        tail = b""
        async for chunk in reply.aiter_raw():
            tail = (tail + chunk)[-20:]
        assert tail.endswith(b"data: [DONE]\n\n"), tail


async def _round(url: str, process: psutil.Process, body: dict[str, object]) -> tuple[float, float]:
    """Processor and wall seconds of some streams, `_STREAMS` at a time."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        await _stream(client, url, body)
        before, began = process.cpu_times(), time.perf_counter()
        for _ in range(2):
            await asyncio.gather(*(_stream(client, url, body) for _ in range(_STREAMS)))
        after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return cpu_s, time.perf_counter() - began


async def _row_cost_s(url: str) -> float:
    """Processor seconds that `record` takes for a row, at 200 requests a second, without gateways.

    Small against the moods of a shared machine, and so measured by itself too.
    """
    writer = LedgerWriter(open_database(url))
    named = msgspec.structs.asdict(_ENTRY)

    async def client(name: str, *, recorded: bool) -> None:
        for number in range(25):
            await asyncio.sleep(_STREAMS / 200)
            entry = Entry(**{**named, "id": f"{name}-{number}"})
            if recorded:
                await writer.record(entry)

    async def load(name: str, *, recorded: bool) -> float:
        before = time.process_time()
        async with asyncio.TaskGroup() as group:
            for stream in range(_STREAMS):
                group.create_task(client(f"{name}-{stream}", recorded=recorded))
        return (time.process_time() - before) / (25 * _STREAMS)

    differences = [
        await load(f"{number}", recorded=True) - await load("", recorded=False)
        for number in range(5)
    ]
    await writer.close()
    return statistics.median(differences)


async def _measure(
    gateways: dict[str, tuple[str, psutil.Process]], body: dict[str, object], rounds: int
) -> float:
    """Print processor and wall time in turns; returns a request's processor seconds without."""
    cpu: dict[str, list[float]] = {name: [] for name in gateways}
    wall: dict[str, list[float]] = {name: [] for name in gateways}
    for number in range(rounds + 2):
        names = list(gateways) if number % 2 else list(reversed(gateways))
        for name in names:
            cpu_s, wall_s = await _round(*gateways[name], body)
            if number >= 2:  # the first ones warm up
                cpu[name].append(cpu_s)
                wall[name].append(wall_s)
    requests = 2 * _STREAMS
    for name in gateways:
        cpu_ms = statistics.median(cpu[name]) / requests * 1e3
        per_s = requests / statistics.median(wall[name])
        print(f"{name:12} {cpu_ms:7.3f} ms of processor a request, {per_s:7.1f} requests/s")
    for name in list(gateways)[1:]:
        ratios = [
            statistics.median(a / b for a, b in zip(taken[name], taken["off"], strict=True))
            for taken in (cpu, wall)
        ]
        print(f"{name} / off: {ratios[0]:.3f} processor time, {ratios[1]:.3f} wall time")
    return statistics.median(cpu["off"]) / requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder, for its tokenizer")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--postgresql", help="measure this database too")
    parser.add_argument("--serve-fake", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_fake:
        _serve_fake(options.serve_fake)
        return
    if options.model is None:
        parser.error("--model is needed")
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        fake = _free_port()
        exits.enter_context(_process(__file__, "--serve-fake", str(fake), env={}, port=fake))
        topology = Topology(
            model="model",
            model_dir=str(options.model),
            gateway_url="http://127.0.0.1:1",
            planner_url="http://127.0.0.1:1",
            main_url=f"http://127.0.0.1:{fake}",
            main_memory_gb=1.0,
            experts=[],
        )
        topology.save(folder / "topology.json")
        # The second one without a ledger is the control: how far apart are two equal gateways?
        ledgers = {"off": "", "control": "", "sqlite": f"sqlite:///{folder / 'ledger.db'}"}
        if options.postgresql:
            ledgers["postgresql"] = options.postgresql
        gateways = {}
        for name, ledger in ledgers.items():
            port = _free_port()
            env = {
                "REMOE_TOPOLOGY": str(folder / "topology.json"),
                "REMOE_GATEWAY_AUTH": "off",
                "REMOE_LOG_LEVEL": "error",
                "PORT": str(port),
                **({"REMOE_GATEWAY_LEDGER": ledger} if ledger else {}),
            }
            process = exits.enter_context(_process("-m", "gateway", env=env, port=port))
            gateways[name] = (f"http://127.0.0.1:{port}", process)
        body: dict[str, object] = {
            "model": "model",
            "prompt": "Hello",
            "max_tokens": options.tokens,
            "stream": True,
        }
        request_s = asyncio.run(_measure(gateways, body, options.rounds))
        row_s = asyncio.run(_row_cost_s(f"sqlite:///{folder / 'direct.db'}"))
        print(f"one row by itself: {row_s * 1e6:.0f} us, {row_s / request_s:.1%} of such a request")


if __name__ == "__main__":
    main()
