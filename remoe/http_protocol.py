"""uvicorn's protocol with two differences: nothing waits for the event loop, and slow clients are given up.

A request begins as soon as what has arrived of it is read, and what is written leaves at once; else
both would wait behind all that the event loop has to do by then, tokens of other streams above all.

uvicorn waits without limit for a request's head. Ten thousand connections that send a byte now and
then would use up a server's descriptors (the attack is called slow-loris).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from remoe.eager import start_now

__all__ = ["HEAD_TIMEOUT_S", "ServerProtocol"]

HEAD_TIMEOUT_S = 10.0
"""From a connection's first byte expected to the end of the request's head."""


class ServerProtocol(HttpToolsProtocol):
    """One connection of a server."""

    _head_timer: asyncio.TimerHandle | None = None
    _reading = False
    _begun: tuple[RequestResponseCycle, Any] | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is None:
            # uvloop keeps what is written until the end of its turn, but for what is too much. Its
            # TLS would take the limit for a client that does not read.
            transport.set_write_buffer_limits(high=0)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        # Between requests uvicorn's own keep-alive timer runs, until the next one begins.
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        self._reading = True
        try:
            super().data_received(data)
        finally:
            self._reading = False
            begun, self._begun = self._begun, None
            if begun is not None:
                cycle, app = begun
                task = start_now(self.loop, cycle.run_asgi(app))
                if not task.done():
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._reading and self._begun is None:
            self._begun = cycle, app  # when its body is read too, as far as it is there
        else:
            super()._start_asgi_task(cycle, app)

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
