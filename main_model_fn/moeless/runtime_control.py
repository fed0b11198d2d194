"""Waking functions and letting them go: what the main function asks of the runtime.

The local runtime takes wishes on its control socket (remoe/runtime_status.py). On a cluster there
is none: a connection wakes a function there too, and its window lets it go.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from remoe.runtime_status import scale_line

__all__ = ["RuntimeControl"]

_log = structlog.get_logger()
_TIMEOUT_S = 2.0


class RuntimeControl:
    """`urls` are of the functions by name, `path` the control socket's if there is one."""

    def __init__(self, urls: Mapping[str, str], path: Path | None) -> None:
        self._urls = dict(urls)
        self._path = path

    def scale(self, name: str, replicas: int, *, for_s: float) -> None:
        """Ask for at least so many replicas for a while; for 0, to sleep unless it is called.

        Best effort: a function that is not there is started by the first call to it.
        """
        try:
            if self._path is not None:
                self._ask(self._path, scale_line(name, replicas, for_s=for_s))
            elif replicas:
                self._connect(self._urls[name])
        except (OSError, http.client.HTTPException) as error:
            _log.info("function_not_scaled", function=name, reason=repr(error))

    def _ask(self, path: Path, line: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(line)
            connection.recv(1)

    def _connect(self, url: str) -> None:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(
            parts.hostname or "127.0.0.1", parts.port or 80, timeout=_TIMEOUT_S
        )
        with contextlib.closing(connection):
            connection.request("GET", "/readyz")
            connection.getresponse().read()
