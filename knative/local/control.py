"""The supervisor's control socket: one request a connection, a word and a newline; JSON back.

`status` is answered once; `watch` with a line now and whenever something changes; `stop` by the
end of the connection, when everything has stopped; `scale` with `ok`, or `no` if nothing is so
called.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from remoe.errors import UnavailableError
from remoe.runtime_status import RuntimeStatus, parse_scale_line

__all__ = ["ControlServer", "ask_status", "ask_stop"]

_STATUS = b"status\n"
_STOP = b"stop\n"
_WATCH = b"watch\n"
# A watcher that reads nothing is dropped rather than waited for.
_MOST_UNREAD_BYTES = 1 << 20
_TIMEOUT_S = 5.0


class ControlServer:
    """Answers until `close`; `publish` tells the watchers."""

    def __init__(
        self,
        *,
        status: Callable[[], RuntimeStatus],
        stop: Callable[[], None],
        scale: Callable[[str, int, float], bool],
    ) -> None:
        self._status = status
        self._stop = stop
        self._scale = scale
        self._server: asyncio.Server | None = None
        self._stopping: list[asyncio.StreamWriter] = []
        self._watchers: set[asyncio.StreamWriter] = set()

    async def start(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._answer, path)

    async def close(self) -> None:
        for writer in (*self._stopping, *self._watchers):
            writer.close()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def publish(self) -> None:
        """Send the status to all watchers."""
        if not self._watchers:
            return
        line = msgspec.json.encode(self._status()) + b"\n"
        for writer in tuple(self._watchers):
            if writer.is_closing() or writer.transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
                writer.transport.abort()
                self._watchers.discard(writer)
            else:
                writer.write(line)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(_TIMEOUT_S):
                line = await reader.readline()
            if line == _STOP:
                self._stopping.append(writer)
                self._stop()
                return
            if line == _WATCH:
                self._watchers.add(writer)
                self.publish()
                await reader.read()  # nothing comes: this is its end
                self._watchers.discard(writer)
            elif line.startswith(b"scale "):
                wish = parse_scale_line(line)
                done = wish is not None and self._scale(*wish)
                writer.write(b"ok\n" if done else b"no\n")
                await writer.drain()
            else:
                writer.write(msgspec.json.encode(self._status()))
                await writer.drain()
        writer.close()


def ask_status(path: Path) -> RuntimeStatus:
    """Ask a running supervisor; raises UnavailableError if none answers."""
    return msgspec.json.decode(_ask(path, _STATUS, timeout_s=_TIMEOUT_S), type=RuntimeStatus)


def ask_stop(path: Path, *, timeout_s: float) -> None:
    """Tell a running supervisor to stop and wait until it has; raises UnavailableError."""
    _ask(path, _STOP, timeout_s=timeout_s)


def _ask(path: Path, line: bytes, *, timeout_s: float) -> bytes:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(line)
            return b"".join(iter(lambda: connection.recv(65536), b""))
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as error:
        raise UnavailableError(
            "Remoe is not running here. Start it with `remoe up`; if it runs with another "
            "REMOE_HOME, set that."
        ) from error
    except (OSError, TimeoutError) as error:
        raise UnavailableError(f"the supervisor does not answer on {path}: {error}") from error
