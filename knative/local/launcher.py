"""Starts a function's program with its socket, its lifeline, its log and its environment."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from knative.local.function_log import FunctionLog, LogPipe
from knative.local.process import Process
from knative.spec import FunctionSpec
from remoe.lifecycle import LIFELINE_VARIABLE

__all__ = ["Launcher", "inherited_environment"]

_LISTEN_FD = 3
_LIFELINE_FD = 4
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Launcher:
    """One function's way to start a replica. `env` goes to all functions, the spec's on top.

    The CPU limit becomes the number of threads that numeric libraries start.
    """

    def __init__(
        self,
        spec: FunctionSpec,
        *,
        listener: socket.socket,
        log_path: Path,
        env: Mapping[str, str],
        lifeline_fd: int,
    ) -> None:
        self.log = FunctionLog(log_path)
        self._argv = [sys.executable, "-m", spec.module]
        self._listener = listener
        self._lifeline_fd = lifeline_fd
        self._env = {
            **env,
            **dict.fromkeys(_THREAD_VARIABLES, str(max(1, round(spec.cpu)))),
            **spec.env,
            "K_SERVICE": spec.name,
            "LISTEN_FDS": "1",
            LIFELINE_VARIABLE: str(_LIFELINE_FD),
            "PYTHONUNBUFFERED": "1",
        }

    def launch(self, replica: str, on_exit: Callable[[int], None]) -> tuple[Process, LogPipe]:
        pipe = LogPipe(self.log, replica)
        try:
            process = Process(
                self._argv,
                env={**self._env, "K_REVISION": replica},
                fds={
                    1: pipe.write_fd,
                    2: pipe.write_fd,
                    _LISTEN_FD: self._listener.fileno(),
                    _LIFELINE_FD: self._lifeline_fd,
                },
                on_exit=on_exit,
            )
        finally:
            pipe.close_write()
        return process, pipe


def inherited_environment() -> dict[str, str]:
    """The user's environment, without what an outer service manager meant for this process."""
    private = {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "PORT"}
    return {name: value for name, value in os.environ.items() if name not in private}
