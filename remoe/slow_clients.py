"""Closing connections on which no request arrives: a slow client must not hold a place for ever.

uvicorn waits without limit for a request's head. Ten thousand connections that send a byte now and
then would use up a server's descriptors (the attack is called slow-loris).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HEAD_TIMEOUT_S", "ImpatientProtocol"]

HEAD_TIMEOUT_S = 10.0
"""From a connection's first byte expected to the end of the request's head."""


class ImpatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with a limit on how long a request's head may take."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        # Between requests uvicorn's own keep-alive timer runs, until the next one begins.
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.close()
