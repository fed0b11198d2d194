"""Real expert functions for tests: processes on a socket that outlives them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from remoe.topology import ExpertEndpoint, Topology, socket_url

_EXEC_WITH_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.argv[2], [sys.argv[2], "-m", "expert_fn"])
"""


class ExpertProcess:
    """An expert function behind a listening socket that stays when the process dies.

    `process` is its last replica started; `settings` are environment variables. It listens at
    `port`, or, with a `local_socket`, at none.
    """

    def __init__(
        self,
        model_dir: Path,
        work_dir: Path,
        *,
        last_layer: int,
        replicas: int = 1,
        settings: Mapping[str, str] | None = None,
        local_socket: bool = False,
    ) -> None:
        if local_socket:
            path = work_dir / "experts.sock"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            url = socket_url(path)
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port = self._listener.getsockname()[1]
            url = f"http://127.0.0.1:{self.port}"
        self.topology = Topology(
            model="tiny",
            model_dir=str(model_dir),
            gateway_url="http://127.0.0.1:9",
            planner_url="http://127.0.0.1:9",
            main_url="http://127.0.0.1:9",
            main_memory_gb=1.0,
            experts=[
                ExpertEndpoint(
                    name="tiny-experts",
                    url=url,
                    first_layer=0,
                    last_layer=last_layer,
                    memory_gb=0.5,
                )
            ],
        )
        self._topology_file = work_dir / "topology.json"
        self.topology.save(self._topology_file)
        self._last_layer = last_layer
        self._settings = settings or {}
        self.processes: list[subprocess.Popen[bytes]] = []
        for _ in range(replicas):
            self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start a replica beside those there are."""
        fd = self._listener.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _EXEC_WITH_SOCKET, str(fd), sys.executable],
            pass_fds=(fd,),
            env={
                **os.environ,
                "LISTEN_FDS": "1",
                "REMOE_TOPOLOGY": str(self._topology_file),
                "REMOE_EXPERT_FIRST_LAYER": "0",
                "REMOE_EXPERT_LAST_LAYER": str(self._last_layer),
                "OPENBLAS_NUM_THREADS": "1",
                **self._settings,
            },
        )
        self.processes.append(self.process)
        return self.process

    def replica(self, name: str) -> subprocess.Popen[bytes]:
        """The process behind the name that its replies carry."""
        return next(p for p in self.processes if name.endswith(f"-{p.pid}"))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=5)

    def close_port(self) -> None:
        """Refuse connections from now on; kill the process first, for it holds the socket too."""
        self._listener.close()

    def open_port(self) -> None:
        """Listen again where it did."""
        self._listener = socket.create_server(("127.0.0.1", self.port))

    def stop_reading(self) -> None:
        """Freeze the process: what is sent to it from now on is not answered."""
        self.process.send_signal(signal.SIGSTOP)

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(timeout=5)
        self._listener.close()
