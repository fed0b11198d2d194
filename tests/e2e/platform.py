"""The whole platform as a user starts it: `remoe up`, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import openai


class Platform:
    """`remoe up` with its own home and port; leaving the block stops it as Ctrl-C does."""

    def __init__(self, model_dir: Path, home: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.model_dir = model_dir
        self.home = home
        self._env = {**os.environ, "REMOE_HOME": str(home), "NO_COLOR": "1"}
        self.log = home / "up.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "remoe.cli", "up", "--model-dir", str(model_dir)),
                    # A tiny model's operators are over before a second thread has woken up.
                    *("--port", str(self.port), "--threads", "1", *options),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
            )
        self.wait_for(lambda: "Remoe is running" in self.output(), within_s=60)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0
        )

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, holds: Callable[[], bool], *, within_s: float) -> None:
        """Look until it holds: there is no clock to inject into processes of their own."""
        deadline = time.monotonic() + within_s
        while not holds():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def status(self) -> list[dict[str, Any]]:
        """The functions, as `remoe status --json` tells them."""
        done = subprocess.run(
            [sys.executable, "-m", "remoe.cli", "status", "--json"],
            env=self._env,
            capture_output=True,
            check=True,
        )
        functions: list[dict[str, Any]] = json.loads(done.stdout)["functions"]
        return functions

    def experts(self) -> list[dict[str, Any]]:
        return [function for function in self.status() if "-experts-" in function["name"]]

    def pids(self) -> set[int]:
        """All processes whose parent is the supervisor."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return {int(pid) for pid in children.read_text(encoding="ascii").split()}

    def pids_of(self, module: str) -> list[int]:
        return [
            pid
            for pid in sorted(self.pids())
            if module in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
        ]

    def stop(self, signum: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(signum)
        return self.process.wait(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.stop()
