"""The connections to one expert function, by the replica behind each.

Replicas share an address. Locally a connection stays with the replica that accepted it; behind a
cluster's balancer its replica is whoever answered last, which is only likely to answer again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from main_model_fn.http_connection import BROKEN, HttpAddress, HttpConnection, wait_for

__all__ = ["ReplicaConnections"]

_MOST_IDLE = 16
_RECEIVE_BYTES = 256 * 1024
_PROBE_EVERY_S = 1.0


class ReplicaConnections:
    """Idle and busy connections. `open` never waits; it raises OSError."""

    def __init__(
        self, address: HttpAddress, body_limit_bytes: int, clock: Callable[[], float]
    ) -> None:
        self.address = address
        self._limit_bytes = body_limit_bytes
        self._clock = clock
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._idle: list[HttpConnection] = []
        self._busy: set[HttpConnection] = set()
        self._probe: HttpConnection | None = None
        self._probed_at = -_PROBE_EVERY_S

    def take(self, avoid: Collection[str] = ()) -> HttpConnection:
        """An idle connection to the replica with the fewest calls, not one of `avoid`, or a new one.

        A connection that the function closed meanwhile is noticed before it is used.
        """
        usable = self._idle.copy()
        if avoid:
            usable = [connection for connection in usable if connection.replica not in avoid]
        if self._busy and len(usable) > 1:
            calls = [connection.replica for connection in self._busy]
            usable.sort(key=lambda idle: -calls.count(idle.replica))
        # Of equals the last used: whoever is between may have let go of the others.
        while usable:
            connection = usable.pop()
            self._idle.remove(connection)
            if connection.quiet:
                self._busy.add(connection)
                return connection
            connection.close()
        return self.open()

    @property
    def next(self) -> HttpConnection | None:
        """The idle connection that `take` would look at first while none is busy."""
        return self._idle[-1] if self._idle and not self._busy else None

    def claim(self, connection: HttpConnection) -> None:
        """Note that the `next` one was taken."""
        self._idle.remove(connection)
        self._busy.add(connection)

    def open(self) -> HttpConnection:
        connection = HttpConnection.open(self.address, self._buffer, self._limit_bytes)
        self._busy.add(connection)
        return connection

    def give_back(self, connection: HttpConnection) -> None:
        """Keep a connection whose reply was read to its end."""
        self._busy.discard(connection)
        if connection.keep_alive and len(self._idle) < _MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def drop(self, connection: HttpConnection) -> None:
        """Close a connection that broke, or whose reply nobody waits for any more."""
        self._busy.discard(connection)
        connection.close()

    @property
    def replicas(self) -> int:
        """Replicas with a live connection."""
        self._forget_ended()
        return len({connection.replica for connection in (*self._idle, *self._busy)} - {""})

    def look_for_replicas(self) -> None:
        """Now and then ask on a new connection who answers there, without waiting for it.

        The kernel, or the cluster's balancer, gives it to any replica that is ready.
        """
        if self._probe is not None:
            self._finish_probe(self._probe)
        if self._probe is None and self._clock() - self._probed_at >= _PROBE_EVERY_S:
            self._probed_at = self._clock()
            try:
                self._probe = HttpConnection.open(self.address, self._buffer, self._limit_bytes)
                self._probe.send(self.address.request("GET", "/readyz"))
            except OSError:
                self._end_probe()

    def close(self) -> None:
        self._end_probe()
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()
        self._busy.clear()

    def _forget_ended(self) -> None:
        for connection in [idle for idle in self._idle if not idle.quiet]:
            self._idle.remove(connection)
            connection.close()

    def _finish_probe(self, probe: HttpConnection) -> None:
        """Keep the probe if it found somebody new."""
        late = self._clock() - self._probed_at >= _PROBE_EVERY_S
        try:
            answered = bool(wait_for([probe], 0)) and probe.advance() is not None
        except BROKEN:
            self._end_probe()
            return
        if answered and probe.replica not in {idle.replica for idle in self._idle}:
            self._probe = None
            self.give_back(probe)
        elif answered or late:
            self._end_probe()

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None
