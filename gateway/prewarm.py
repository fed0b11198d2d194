"""Waking the expert functions a plan expects to need, while the prompt is still on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import aiohttp
import structlog

from gateway.background import Background
from remoe.topology import socket_path

__all__ = ["Prewarmer"]

_log = structlog.get_logger()
_TIMEOUT_S = 10.0


class Prewarmer:
    """A connection is what wakes a function at zero: one no-op GET each, one at a time."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        urls: Mapping[str, str],
        background: Background,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._wanted = wanted
        self._http = http
        self._urls = dict(urls)
        self._background = background
        self._under_way: set[str] = set()

    def wake(self, names: Sequence[str]) -> None:
        """Return at once, or do nothing unless it is `wanted` now; a function that cannot be woken is found out by whoever calls it."""
        for name in names if self._wanted() else ():
            url = self._urls.get(name)
            if url is None:
                _log.debug("cannot prewarm an unknown function", function=name)
            elif name not in self._under_way:
                self._under_way.add(name)
                if not self._background.start(self._wake(name, url)):
                    self._under_way.discard(name)

    async def _wake(self, name: str, url: str) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                path = socket_path(url)
                if path is None:
                    await _ask(self._http, url)
                else:
                    async with aiohttp.ClientSession(
                        connector=aiohttp.UnixConnector(path)
                    ) as session:
                        await _ask(session, "http://localhost")
        except (aiohttp.ClientError, TimeoutError) as error:
            _log.debug("prewarming failed", function=name, reason=repr(error))
        finally:
            self._under_way.discard(name)


async def _ask(session: aiohttp.ClientSession, url: str) -> None:
    async with session.get(f"{url}/readyz") as response:
        await response.read()
