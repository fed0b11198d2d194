"""A small HTTP/1.1 server on `selectors` and httptools: one thread, one call at a time.

Calls are computed whole, so an event loop has nothing to interleave, and asyncio's import would be
half of the cold start (docs/adr/0002-expert-protocol.md). Parsing is llhttp's, through httptools.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator

from expert_fn.connection import Connection
from expert_fn.endpoint import Endpoint
from remoe.lifecycle import InFlight, Notifier

__all__ = ["serve"]

_DRAIN_S = 0.05
_MOST_DRAIN_S = 1.0
_RECEIVE_BYTES = 256 * 1024


def serve(
    listener: socket.socket,
    load: Callable[[], Endpoint],
    notifier: Notifier,
    in_flight: InFlight,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain: calls are computed whole, so none is cut."""
    with _stop_signals() as stop, selectors.DefaultSelector() as selector:
        server = _Server(selector, load(), in_flight)
        selector.register(stop, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        notifier.ready()
        while not server.turn(None, listener=listener, stop=stop):
            pass
        notifier.stopping()
        selector.unregister(stop)
        selector.unregister(listener)
        listener.close()
        server.drain()


class _Server:
    """Who is connected, and a turn of the loop."""

    def __init__(
        self, selector: selectors.BaseSelector, endpoint: Endpoint, in_flight: InFlight
    ) -> None:
        self._selector = selector
        self._endpoint = endpoint
        self._in_flight = in_flight
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._connections: set[Connection] = set()

    def turn(
        self,
        timeout_s: float | None,
        *,
        listener: socket.socket | None = None,
        stop: socket.socket | None = None,
    ) -> bool:
        """Serve whoever is ready, waiting for the first; True if `stop` was among them."""
        stopped = False
        for key, events in self._selector.select(timeout_s):
            if isinstance(key.fileobj, Connection):
                self._serve(key.fileobj, events)
            elif key.fileobj is listener:
                self._accept(listener)
            else:
                stopped |= key.fileobj is stop
        return stopped

    def drain(self) -> None:
        """A call that was under way to us when we stopped listening is still answered."""
        now = time.monotonic()
        linger_until, last = now + _DRAIN_S, now + _MOST_DRAIN_S
        while now < linger_until or (now < last and any(c.busy for c in self._connections)):
            self.turn(_DRAIN_S)
            now = time.monotonic()
        for connection in list(self._connections):
            self._drop(connection)

    def _accept(self, listener: socket.socket) -> None:
        """One at a time: the next may be for another replica on the same socket."""
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # another replica was faster, or the client has left
        connection = Connection(client, self._endpoint, self._in_flight)
        self._connections.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, connection: Connection, events: int) -> None:
        was_sending = connection.sending
        try:
            if events & selectors.EVENT_WRITE:
                connection.flush()
            else:
                connection.receive(self._buffer)
        except OSError:
            self._drop(connection)
            return
        if connection.ended:
            self._drop(connection)
        elif connection.sending != was_sending:
            # Who does not read its answers is not listened to.
            wanted = selectors.EVENT_WRITE if connection.sending else selectors.EVENT_READ
            self._selector.modify(connection, wanted)

    def _drop(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._selector.unregister(connection)
        connection.close()


@contextlib.contextmanager
def _stop_signals() -> Iterator[socket.socket]:
    """A socket that becomes readable with the first SIGTERM or SIGINT."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    with reader, writer:
        previous = signal.set_wakeup_fd(writer.fileno())
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: None)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(previous)
