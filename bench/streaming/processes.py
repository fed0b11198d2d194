"""The processes of a bench: started, waited for until they listen, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from remoe.topology import Topology


class Running(NamedTuple):
    """Where a process listens."""

    port: int
    pid: int

    def cpu_s(self) -> float:
        """Processor time it has used so far, in steps of 10 ms."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def scheduled_s(self) -> float:
        """The same as the scheduler counts it, in nanoseconds; of threads that live."""
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    def pin(self, cpu: int) -> None:
        """Let its threads run on one processor only."""
        for thread in psutil.Process(self.pid).threads():
            os.sched_setaffinity(thread.id, {cpu})


@contextmanager
def running(*command: str, prints_port: bool = True, **variables: str) -> Iterator[Running]:
    """A process; a `{port}` in its command, and PORT, are the port that it is to listen on."""
    port = _free_port()
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
        _wait_for(port, process)
        yield Running(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def upstream(model_dir: Path, *, interval_s: float) -> Iterator[Running]:
    command = ("-m", "bench.streaming.upstream", str(interval_s))
    with running(sys.executable, *command, str(model_dir / "tokenizer.json")) as started:
        yield started


@contextmanager
def gateway(
    model: str,
    model_dir: Path,
    behind: int,
    *,
    module: str = "gateway",
    folder: Path | None = None,
    **variables: str,
) -> Iterator[Running]:
    """A gateway whose main function and planner listen on the port `behind`."""
    url = f"http://127.0.0.1:{behind}"
    path = (folder or model_dir) / f"topology-{behind}.json"
    Topology(
        model=model,
        model_dir=str(model_dir),
        gateway_url="http://127.0.0.1:1",
        planner_url=url,
        main_url=url,
        main_memory_gb=1.0,
        experts=[],
    ).save(path)
    with running(
        *(sys.executable, "-m", module),
        prints_port=False,
        REMOE_TOPOLOGY=str(path),
        REMOE_LOG_LEVEL="warning",
        REMOE_GATEWAY_AUTH="off",  # it binds every address
        **variables,
    ) as started:
        yield started


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _wait_for(port: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        assert process.poll() is None, "a process of the bench ended at once"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(process.args)
