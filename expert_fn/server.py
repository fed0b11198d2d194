"""A small HTTP/1.1 server on epoll(7) and httptools: one thread, one call at a time.

Calls are computed whole, so an event loop has nothing to interleave, and asyncio's import would be
half of the cold start (docs/adr/0002-expert-protocol.md). Parsing is llhttp's, through httptools.
"""

from __future__ import annotations

import contextlib
import math
import select
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
    with _stop_signals() as stop:
        server = _Server(load(), in_flight, listener)
        server.wait_for(stop)
        notifier.ready()
        while not server.turn(None):
            pass
        notifier.stopping()
        server.forget(stop)
        server.forget(listener)
        listener.close()
        server.drain()


class _Server:
    """Who is connected, and a turn of the loop."""

    def __init__(self, endpoint: Endpoint, in_flight: InFlight, listener: socket.socket) -> None:
        self._poll = select.epoll()
        self._endpoint = endpoint
        self._in_flight = in_flight
        self._listener = listener
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._connections: dict[int, Connection] = {}  # by descriptor
        self.wait_for(listener)

    def wait_for(self, other: socket.socket) -> None:
        """Have a turn end also when this can be read."""
        self._poll.register(other, select.EPOLLIN)

    def forget(self, other: socket.socket) -> None:
        self._poll.unregister(other)

    def turn(self, timeout_s: float | None) -> bool:
        """Serve whoever is ready, waiting for the first; True if another socket was among them."""
        others = False
        for descriptor, _ in self._ready(timeout_s):
            connection = self._connections.get(descriptor)
            if connection is not None:
                self._serve(connection)
            elif descriptor == self._listener.fileno():
                self._accept()
            else:
                others = True
        return others

    def _ready(self, timeout_s: float | None) -> list[tuple[int, int]]:
        ready = self._poll.poll(0)
        if not ready:
            self._endpoint.polling.wait(self._poll.fileno(), timeout_s or math.inf)
            ready = self._poll.poll(timeout_s)
        return ready

    def drain(self) -> None:
        """A call that was under way to us when we stopped listening is still answered."""
        now = time.monotonic()
        linger_until, last = now + _DRAIN_S, now + _MOST_DRAIN_S
        while now < linger_until or (now < last and self._busy):
            self.turn(_DRAIN_S)
            now = time.monotonic()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._endpoint.polling.close()
        self._poll.close()

    @property
    def _busy(self) -> bool:
        return any(connection.busy for connection in self._connections.values())

    def _accept(self) -> None:
        """One at a time: the next may be for another replica on the same socket."""
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # another replica was faster, or the client has left
        connection = Connection(client, self._endpoint, self._in_flight)
        self._connections[connection.fileno()] = connection
        self._poll.register(connection, select.EPOLLIN)

    def _serve(self, connection: Connection) -> None:
        was_sending = connection.sending
        try:
            if was_sending:
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
            wanted = select.EPOLLOUT if connection.sending else select.EPOLLIN
            self._poll.modify(connection, wanted)

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.fileno()]
        self._poll.unregister(connection)
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
