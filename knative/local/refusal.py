"""Answers held connections with 503 when a function cannot start, so that nobody hangs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket

import msgspec

from remoe.errors import UnavailableError

__all__ = ["Refusal"]

_HEADER_TIMEOUT_S = 2.0
_LINGER_S = 1.0
_MOST_HEADER = 64 << 10


class Refusal:
    """Accepts what waits on a listening socket and answers each with OpenAI's error envelope."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._tasks: set[asyncio.Task[None]] = set()

    def refuse_waiting(self, message: str, *, retry_after_s: float) -> int:
        """Answer every connection in the backlog; returns how many there were."""
        error = UnavailableError(message, retry_after_s=retry_after_s)
        body = msgspec.json.encode(error.envelope())
        response = (
            "HTTP/1.1 503 Service Unavailable\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            f"retry-after: {max(1, math.ceil(retry_after_s))}\r\n"
            "connection: close\r\n\r\n"
        ).encode() + body
        count = 0
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return count
            count += 1
            task = asyncio.get_running_loop().create_task(_answer(connection, response))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _answer(connection: socket.socket, response: bytes) -> None:
    reader, writer = await asyncio.open_connection(sock=connection, limit=_MOST_HEADER)
    try:
        with contextlib.suppress(
            OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
        ):
            async with asyncio.timeout(_HEADER_TIMEOUT_S):
                await reader.readuntil(b"\r\n\r\n")
            writer.write(response)
            writer.write_eof()
            # Closing with unread bytes would reset the connection and lose the answer.
            async with asyncio.timeout(_LINGER_S):
                while await reader.read(_MOST_HEADER):
                    pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
