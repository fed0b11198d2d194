"""The runtime, seen from the gateway: which replicas are alive, told whenever that changes.

Locally the supervisor tells it, over its control socket; on a cluster the Kubernetes API does
(`pod_watch.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import aiohttp
import msgspec
import structlog

from gateway.residency import ResidentMeter
from remoe.runtime_status import RuntimeStatus

__all__ = ["RuntimeWatch", "Source", "supervisor_says"]

Source = Callable[[], AsyncGenerator[RuntimeStatus, None]]

_log = structlog.get_logger()
_decoder = msgspec.json.Decoder(RuntimeStatus)
_LONGEST_LINE_BYTES = 16 << 20
_RETRY_S = 1.0


class RuntimeWatch:
    """Follows a source, again and again as it ends; without one it knows nothing."""

    def __init__(
        self,
        source: Source | None,
        meter: ResidentMeter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.latest: RuntimeStatus | None = None
        self._source = source
        self._clock = clock
        self._ready_since: dict[str, float] = {}
        self._meter = meter
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._source is not None:
            self._task = asyncio.create_task(self._follow(self._source))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def is_ready(self, url: str) -> bool:
        """Whether a replica of the function at `url` is known to serve."""
        return url in self._ready_since

    def ready_for_s(self, url: str) -> float:
        """How long the function at `url` has been known to serve without a break, 0 if it is not."""
        since = self._ready_since.get(url)
        return 0.0 if since is None else self._clock() - since

    def take(self, state: RuntimeStatus | None) -> None:
        """Go by this from now on; None if the runtime is out of sight."""
        self.latest = state
        now = self._clock()
        ready = {function.url for function in state.functions if function.ready} if state else set()
        self._ready_since = {url: self._ready_since.get(url, now) for url in ready}
        if state is None:
            self._meter.forget()
        else:
            self._meter.update(state)

    async def _follow(self, source: Source) -> None:
        while True:
            try:
                async with contextlib.aclosing(source()) as states:
                    async for state in states:
                        self.take(state)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                # A msgspec.DecodeError is a ValueError.
                _log.warning("cannot_watch_the_runtime", reason=repr(error))
            self.take(None)
            await asyncio.sleep(_RETRY_S)


def supervisor_says(path: Path) -> Source:
    """What the local supervisor says on its control socket."""

    async def read() -> AsyncGenerator[RuntimeStatus, None]:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LONGEST_LINE_BYTES)
        try:
            writer.write(b"watch\n")
            while line := await reader.readline():
                yield _decoder.decode(line)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    return read
