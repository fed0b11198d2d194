"""Expert calls over kept-alive HTTP connections of the standard library.

`http.client` splits a call into request and response, which is all the fan-out needs; measured
against asyncio clients in docs/adr/0002-expert-protocol.md.
"""

from __future__ import annotations

import http.client
import select
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
import structlog

from main_model_fn.breaker import CircuitBreaker
from main_model_fn.transport import PendingReply, RemoteResult
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import CONTENT_TYPE, PATH, ExpertCall, ExpertFailure, ExpertReply
from remoe.topology import ExpertEndpoint, Topology

__all__ = ["HttpTransport"]

_log = structlog.get_logger()
_encoder = msgspec.msgpack.Encoder()
_reply_decoder = msgspec.msgpack.Decoder(ExpertReply)
_failure_decoder = msgspec.msgpack.Decoder(ExpertFailure)
_HEADERS = {"Content-Type": CONTENT_TYPE}
_NETWORK_ERRORS = (OSError, http.client.HTTPException)


class _Channel:
    """The idle connections to one function, and its breaker."""

    def __init__(
        self, endpoint: ExpertEndpoint, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self.name = endpoint.name
        parts = urlsplit(endpoint.url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._timeout_s = timeout_s
        self._idle: list[http.client.HTTPConnection] = []
        self.breaker = CircuitBreaker(clock)

    def take(self) -> http.client.HTTPConnection:
        """An idle connection that the function has not closed meanwhile, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if not _has_ended(connection):
                return connection
            connection.close()
        return self.fresh()

    def fresh(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)

    def give_back(self, connection: http.client.HTTPConnection) -> None:
        self._idle.append(connection)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def _has_ended(connection: http.client.HTTPConnection) -> bool:
    """Whether an idle connection is readable, which can only mean that its peer is gone."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


class _HttpPending:
    """One call under way. A broken connection is retried once, on a fresh one.

    It broke because the replica died, or because it scaled away just as the call left; in both
    cases the function's address holds the retry until a replica is there.
    """

    def __init__(self, channel: _Channel, call: ExpertCall, clock: Callable[[], float]) -> None:
        self._channel = channel
        self._clock = clock
        self._layer = call.layer
        self._body = _encoder.encode(call)
        self._sent_at = clock()
        self._connection = channel.take() if channel.breaker.allows else None
        self._send_error: Exception | None = None
        if self._connection is not None:
            self._send(self._connection)

    def _send(self, connection: http.client.HTTPConnection) -> None:
        self._send_error = None
        try:
            connection.request("POST", PATH, self._body, _HEADERS)
        except _NETWORK_ERRORS as error:
            self._send_error = error

    def result(self) -> RemoteResult:
        if self._connection is None:
            raise ExpertUnavailableError(f"{self._channel.name} failed a moment ago")
        retries = 0
        try:
            status, body = self._read(self._connection)
        except TimeoutError as error:
            raise self._failed(self._connection, error) from error
        except _NETWORK_ERRORS as error:
            self._connection.close()
            retries = 1
            _log.warning(
                "expert_call_retried",
                function=self._channel.name,
                layer=self._layer,
                error=repr(error),
            )
            self._connection = self._channel.fresh()
            self._send(self._connection)
            try:
                status, body = self._read(self._connection)
            except _NETWORK_ERRORS as second:
                raise self._failed(self._connection, second) from second
        if status != http.client.OK:
            raise self._failed(self._connection, ConnectionError(_failure_text(status, body)))
        self._channel.give_back(self._connection)
        self._channel.breaker.succeeded()
        reply = _reply_decoder.decode(body)
        return RemoteResult(
            partial=reply.partial,
            busy_s=reply.busy_s,
            cold_start_s=max(0.0, self._clock() - self._sent_at - reply.ready_for_s),
            retries=retries,
            bytes_moved=len(self._body) + len(body),
        )

    def _read(self, connection: http.client.HTTPConnection) -> tuple[int, bytes]:
        if self._send_error is not None:
            raise self._send_error
        with connection.getresponse() as response:
            return response.status, response.read()

    def _failed(
        self, connection: http.client.HTTPConnection, error: Exception
    ) -> ExpertUnavailableError:
        connection.close()
        self._channel.breaker.failed()
        return ExpertUnavailableError(f"{self._channel.name}: {error!r}")


def _failure_text(status: int, body: bytes) -> str:
    try:
        failure = _failure_decoder.decode(body)
    except msgspec.DecodeError:
        return f"HTTP {status}"
    return f"{failure.code}: {failure.message}"


class HttpTransport:
    """One channel per expert function; used from the engine's thread alone."""

    def __init__(
        self,
        topology: Topology,
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._channels = {
            layer: channel
            for endpoint in topology.experts
            for channel in [_Channel(endpoint, timeout_s, clock)]
            for layer in range(endpoint.first_layer, endpoint.last_layer + 1)
        }

    def send(self, call: ExpertCall) -> PendingReply:
        return _HttpPending(self._channels[call.layer], call, self._clock)

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
