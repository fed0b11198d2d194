"""How fast the load generator sends on one core, how late, and what a request costs it.

    python bench/load_rate.py --rate 500

An open loop at a constant rate against a null server on another core, several short runs; then the
client alone beside httpx, one request after the other, interleaved in one run. Machines are noisy:
read the best and the median of the runs, and the ratio.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import httpx
import numpy as np
import uvloop

from loadgen.client import RequestShape, StreamingClient, open_session
from loadgen.clock import MonotonicClock
from loadgen.record import RequestRecord
from loadgen.replay import Replay, ReplayLimits
from loadgen.workload import PlannedRequest

PROMPT = "word " * 200
ALLOWED_LAG_MS = 5.0


async def open_loop(url: str, rate: float, seconds: float, tokens: int) -> tuple[float, ...]:
    """Return (requests/s sent, lag p50, lag p99, largest lag in ms, CPU ms a request)."""
    clock = MonotonicClock()
    shape = RequestShape(url, "null")
    done: list[RequestRecord] = []
    async with open_session(api_key=None) as session:
        zero = clock.now() + 0.2
        replay = Replay(
            StreamingClient(session, shape, clock, timeout_s=60, zero=zero),
            clock=clock,
            zero=zero,
            limits=ReplayLimits(),
            body_of=lambda _request, _record: shape.body(PROMPT, tokens),
            on_done=done.append,
            planned=0,
        )
        requests = [PlannedRequest(i, i / rate, 200, tokens) for i in range(int(rate * seconds))]
        before_s = time.process_time()
        await replay.open_loop(requests)
        cpu_s = time.process_time() - before_s
    assert all(record.status == "completed" for record in done)
    lags_ms = [1e3 * record.lag_s for record in done if record.lag_s is not None]
    last_s = max(record.sent_s or 0.0 for record in done)
    p50, p99 = np.percentile(lags_ms, [50, 99])
    return len(done) / (last_s + 1 / rate), p50, p99, max(lags_ms), 1e3 * cpu_s / len(done)


async def client_cost(
    url: str, tokens: int, rounds: int = 8, batch: int = 50
) -> tuple[float, float]:
    """CPU ms a request of our client and of httpx: medians of interleaved batches."""
    shape, clock = RequestShape(url, "null"), MonotonicClock()
    body = shape.body(PROMPT, tokens)
    ours: list[float] = []
    theirs: list[float] = []
    async with open_session(api_key=None) as session, httpx.AsyncClient() as other:
        client = StreamingClient(session, shape, clock, timeout_s=60, zero=clock.now())
        for _ in range(rounds):
            before_s = time.process_time()
            for index in range(batch):
                await client.send(RequestRecord(index=index), body)
            ours.append(time.process_time() - before_s)
            before_s = time.process_time()
            for _index in range(batch):
                async with other.stream("POST", shape.url, content=body) as response:
                    async for line in response.aiter_lines():
                        assert line is not None
            theirs.append(time.process_time() - before_s)
    return 1e3 * statistics.median(ours) / batch, 1e3 * statistics.median(theirs) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    server = subprocess.Popen(
        [sys.executable, "-m", "loadgen.null_server"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip() + "/v1"
        os.sched_setaffinity(server.pid, {cores[-1]})
        os.sched_setaffinity(0, {cores[0]})
        print(f"{platform.machine()}, {len(cores)} cores, load {os.getloadavg()[0]:.1f}")
        print("sent/s   lag p50   lag p99   largest   CPU a request")
        p99s = []
        for _ in range(options.runs):
            sent, p50, p99, most, cpu_ms = uvloop.run(
                open_loop(url, options.rate, options.seconds, options.tokens)
            )
            p99s.append(p99)
            print(f"{sent:6.1f} {p50:6.2f} ms {p99:6.2f} ms {most:6.2f} ms {cpu_ms:9.2f} ms")
        print(
            f"lag p99: best {min(p99s):.2f} ms, median {statistics.median(p99s):.2f} ms; "
            f"wanted at most {ALLOWED_LAG_MS:g} ms"
        )
        ours, theirs = uvloop.run(client_cost(url, options.tokens))
        print(
            f"client: {ours:.2f} ms of CPU, httpx {theirs:.2f} ms, {theirs / ours:.1f} times as much"
        )
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
