"""Real functions, started as the runtime starts them, to measure their calls and cold starts."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from main_model_fn.call_times import expert_call, measure_calls
from main_model_fn.http_transport import HttpTransport
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError
from remoe.hardware import CallTimes, ColdStart, Spread
from remoe.topology import ExpertEndpoint, Topology, socket_url

__all__ = [
    "FunctionProcess",
    "layers_env",
    "libraries_s",
    "measure_expert_cold_start",
    "measure_local_calls",
    "measure_main_cold_start",
]

_START_TIMEOUT_S = 120.0
_BACKLOG = 64
_EXEC = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, "-m", sys.argv[2]])
"""


class FunctionProcess:
    """A function's process behind a listening socket of ours; leaving the block ends it."""

    def __init__(
        self,
        module: str,
        model_dir: Path,
        folder: Path,
        env: dict[str, str],
        *,
        planner_url: str | None = None,
    ) -> None:
        """`folder` gets its topology, with a planner if there is one; nothing runs yet."""
        self._module = module
        if module == "expert_fn":  # as on the local platform
            path = (folder / f"{module}.sock").absolute()
            path.unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(_BACKLOG)
            self.url = socket_url(path)
        else:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
            self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        checkpoint = Checkpoint.open(model_dir)
        nowhere = "http://127.0.0.1:9"
        self.topology = Topology(
            model="profiled",
            model_dir=str(model_dir),
            gateway_url=nowhere,
            planner_url=planner_url or nowhere,
            main_url=self.url,
            main_memory_gb=1.0,
            experts=[
                ExpertEndpoint(
                    name="profiled-experts",
                    url=self.url,
                    first_layer=0,
                    last_layer=checkpoint.layers - 1,
                    memory_gb=1.0,
                )
            ],
        )
        path = folder / f"{module}-topology.json"
        self.topology.save(path)
        self._env = {
            **{name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
            "LISTEN_FDS": "1",
            "REMOE_TOPOLOGY": str(path),
            "REMOE_LOG_LEVEL": "error",
            **env,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start the process and return how long its first answer took."""
        fd = self._listener.fileno()
        before = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _EXEC, str(fd), self._module],
            pass_fds=(fd,),
            env=self._env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        connection = http.client.HTTPConnection("localhost")
        try:
            connection.sock = self._connected()
            # The connection waits in the backlog until the process accepts it, as a caller's does.
            connection.request("GET", "/readyz")
            status = connection.getresponse().status
        except OSError as error:
            raise SettingsError(f"{self._module} did not start: {self._why()}") from error
        finally:
            connection.close()
        if status != http.HTTPStatus.OK:
            raise SettingsError(f"{self._module} is not ready: it answered {status}")
        return time.perf_counter() - before

    def _connected(self) -> socket.socket:
        client = socket.socket(self._listener.family)
        client.settimeout(_START_TIMEOUT_S)
        client.connect(self._listener.getsockname())
        return client

    def _why(self) -> str:
        self.stop()
        process = self._process
        if process is None or process.stderr is None:
            return "no output"
        return process.stderr.read().decode(errors="replace").strip()[-500:] or "no output"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if self._process is not None and self._process.stderr is not None:
            self._process.stderr.close()
        self._listener.close()


def measure_local_calls(model_dir: Path) -> CallTimes:
    """Call an expert function of our own as the main function does, with nothing in between."""
    checkpoint = Checkpoint.open(model_dir)
    with (
        tempfile.TemporaryDirectory() as folder,
        FunctionProcess("expert_fn", model_dir, Path(folder), layers_env(checkpoint)) as function,
    ):
        function.start()
        return measure_calls(function.topology)


def measure_expert_cold_start(model_dir: Path, *, starts: int = 5) -> ColdStart:
    """From nothing to the first answer of an expert function: its process, then its weights."""
    checkpoint = Checkpoint.open(model_dir)
    layer = checkpoint.moe_layers[0]
    process: list[float] = []
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(starts):
            env = layers_env(checkpoint)
            with FunctionProcess("expert_fn", model_dir, Path(folder), env) as function:
                process.append(function.start())
                transport = HttpTransport(function.topology, timeout_s=30.0)
                before = time.perf_counter()
                transport.send(expert_call(checkpoint, layer, 1)).result()
                first.append(time.perf_counter() - before)
                transport.close()
    total = [a + b for a, b in zip(process, first, strict=True)]
    return ColdStart(
        phases={"process": Spread.of(process), "first call": Spread.of(first)},
        total=Spread.of(total),
    )


def measure_main_cold_start(model_dir: Path, *, starts: int = 2) -> ColdStart:
    """The same of the main function: its libraries, then its model and cache.

    Without a planner it loads half of the experts, as it does in production when the planner is
    away.
    """
    # Here, because it brings torch.
    from main_model_fn.native_model import NativeShape

    native = NativeShape.of(Checkpoint.open(model_dir)) is not None
    libraries: list[float] = []
    total: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(starts):
            libraries.append(libraries_s(native=native))
            with FunctionProcess("main_model_fn", model_dir, Path(folder), {}) as function:
                total.append(function.start())
    model = [max(0.0, a - b) for a, b in zip(total, libraries, strict=True)]
    return ColdStart(
        phases={"libraries": Spread.of(libraries), "model and cache": Spread.of(model)},
        total=Spread.of(total),
    )


def libraries_s(*, native: bool) -> float:
    """How long a process takes to start and to import what the main function imports.

    That is transformers too where a model is not all `native`. It ends without taking anything
    down again, which a start does not do either.
    """
    before = time.perf_counter()
    library = "" if native else ", main_model_fn.loading, main_model_fn.paged_runner"
    code = f"import os, main_model_fn.app{library}; os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - before


def layers_env(checkpoint: Checkpoint) -> dict[str, str]:
    """The settings of an expert function that holds every layer."""
    return {
        "REMOE_EXPERT_FIRST_LAYER": "0",
        "REMOE_EXPERT_LAST_LAYER": str(checkpoint.layers - 1),
    }
