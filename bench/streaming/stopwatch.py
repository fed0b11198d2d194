"""The gateway with a stopwatch at its sockets: `python -m bench.streaming.stopwatch`.

For each request it notes when its first byte was read, and when the first byte of its answer had
been handed to the kernel, and writes both by reply id as JSON into the file BENCH_TIMES when it ends.
What it takes itself is in the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import gateway.__main__
import remoe.http_protocol

_noted: list[_Noted] = []


class _Noted:
    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.written = 0.0
        self.parts: list[bytes] = []

    def note(self, data: bytes, *, left: bool) -> None:
        if not self.parts:
            if left:
                self._has_left()
            else:
                # uvloop writes at the end of an iteration: in the next one it has been done.
                asyncio.get_running_loop().call_soon(self._has_left)
        self.parts.append(data)

    def _has_left(self) -> None:
        self.written = time.perf_counter()


class _Transport:
    """Tells of an answer's first two writes: its head, and what has its id."""

    def __init__(self, inner: asyncio.Transport) -> None:
        self._inner = inner
        self.noted: _Noted | None = None

    def write(self, data: bytes) -> None:
        self._inner.write(data)
        noted = self.noted
        if noted is not None:
            noted.note(data, left=not self._inner.get_write_buffer_size())
            if len(noted.parts) == 2:
                self.noted = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Timed(remoe.http_protocol.ServerProtocol):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Transport(transport))

    def data_received(self, data: bytes) -> None:
        # The bench's requests come in one piece, one after the other.
        noted = _Noted(time.perf_counter())
        _noted.append(noted)
        self.transport.noted = noted
        super().data_received(data)


def main() -> None:
    remoe.http_protocol.ServerProtocol = _Timed  # type: ignore[misc]
    try:
        gateway.__main__.main()
    finally:
        times = {
            noted.parts[1].split(b'"id":"', 1)[1].split(b'"', 1)[0].decode(): (
                noted.arrived,
                noted.written,
            )
            for noted in _noted
            if len(noted.parts) == 2 and b'"id":"' in noted.parts[1]
        }
        Path(os.environ["BENCH_TIMES"]).write_text(json.dumps(times))


if __name__ == "__main__":
    main()
