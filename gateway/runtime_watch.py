"""The runtime, seen from the gateway: which replicas are alive, told whenever that changes."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import structlog

from gateway.residency import ResidentMeter
from remoe.runtime_status import RuntimeStatus

__all__ = ["RuntimeWatch"]

_log = structlog.get_logger()
_decoder = msgspec.json.Decoder(RuntimeStatus)
_LONGEST_LINE_BYTES = 16 << 20
_RETRY_S = 1.0


class RuntimeWatch:
    """Follows the supervisor's control socket; without one (on a cluster) it knows nothing."""

    def __init__(self, path: Path | None, meter: ResidentMeter) -> None:
        self.latest: RuntimeStatus | None = None
        self._path = path
        self._meter = meter
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._path is not None:
            self._task = asyncio.create_task(self._follow(self._path))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def is_ready(self, url: str) -> bool:
        """Whether a replica of the function at `url` is known to serve."""
        functions = self.latest.functions if self.latest else ()
        return any(function.url == url and function.ready for function in functions)

    async def _follow(self, path: Path) -> None:
        while True:
            try:
                await self._read(path)
            except (OSError, msgspec.DecodeError, ValueError) as error:
                _log.debug("cannot watch the runtime", reason=repr(error))
            self.latest = None
            self._meter.forget()
            await asyncio.sleep(_RETRY_S)

    async def _read(self, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LONGEST_LINE_BYTES)
        try:
            writer.write(b"watch\n")
            while line := await reader.readline():
                self.latest = _decoder.decode(line)
                self._meter.update(self.latest)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
