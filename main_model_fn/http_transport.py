"""Expert calls over kept-alive HTTP connections, hedged once, within a deadline.

Measured against the standard library's and asyncio's clients in docs/adr/0002-expert-protocol.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

import msgspec
import structlog

from main_model_fn.express import ExpressLine, Posted, RowShape
from main_model_fn.http_channel import Channel, on_this_machine
from main_model_fn.http_connection import (
    BROKEN,
    BrokenReplyError,
    HttpConnection,
    HttpReply,
    wait_for,
)
from main_model_fn.transport import PendingReply, RemoteResult
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import (
    ITEM_BYTES,
    MAX_BODY_BYTES,
    ExpertCall,
    ExpertFailure,
    ExpertReply,
    FailureCode,
)
from remoe.kernel.idle_polling import IdlePolling
from remoe.topology import Topology

__all__ = ["HttpTransport"]

_log = structlog.get_logger()
_OK = int(HTTPStatus.OK)
_encoder = msgspec.msgpack.Encoder()
_reply_decoder = msgspec.msgpack.Decoder(ExpertReply)
_failure_decoder = msgspec.msgpack.Decoder(ExpertFailure)

# How long a large call may fill the socket before the next one is sent.
_PUMP_S = 0.005
# How long beyond its time a reply is still taken that is arriving just then.
_ARRIVING_S = 0.05
# A wait cut shorter than this by a request's deadline says nothing about the function.
_FAIR_WAIT_S = 1.0
# Of these a function is not to blame: its answer to another call may be another.
_ABOUT_THE_CALL: frozenset[FailureCode] = frozenset({"body_too_large", "wrong_shape"})


class _RefusedError(Exception):
    """The function answered, and its answer is no."""

    def __init__(self, message: str, code: FailureCode | None = None) -> None:
        super().__init__(message)
        self.code = code


class _HttpPending:
    """One call under way, on one connection, or on two.

    The second is the one retry. It is sent when the first connection breaks, because its replica
    died or scaled away as the call left, or when the reply is late though the function is warm.
    The first good reply counts; the other connection is closed, which ends what it had to say.
    """

    __slots__ = (
        "_asked",
        "_body",
        "_call",
        "_channel",
        "_error",
        "_flying",
        "_head",
        "_hedge_at",
        "_hedges",
        "_patience_s",
        "_retries",
        "_sent_at",
    )

    def __init__(
        self,
        channel: Channel,
        call: ExpertCall,
        deadline_s: float | None,
        traceparent: str | None = None,
        posted: Posted | None = None,
    ) -> None:
        self._channel = channel
        self._call = call
        self._body = _encoder.encode(call)
        self._head = channel.head
        if traceparent is not None:
            self._head += f"traceparent: {traceparent}\r\n".encode("ascii")
        self._sent_at = time.monotonic()
        channel.expect_reply(self._sent_at)
        self._patience_s = min(channel.timeout_s, math.inf if deadline_s is None else deadline_s)
        self._hedge_at = math.inf
        self._flying: list[HttpConnection] = []
        self._asked: list[str] = []
        self._hedges = 0
        self._retries = 0
        self._error: Exception | None = None
        if posted is not None:
            self._take_over(posted)
        elif channel.breaker.allows:
            self._launch()

    def result(self) -> RemoteResult:
        if not (self._flying or self._error):
            raise ExpertUnavailableError(f"{self._channel.name} failed a moment ago")
        deadline = self._sent_at + self._patience_s
        try:
            result = self._take(self._flying.copy())  # it may be there: asking would cost as much
            while self._flying and result is None:
                until = min(deadline, self._hedge_at)
                ready = wait_for(self._flying, until - time.monotonic(), self._channel.polling)
                result = self._take(ready)
                late_s = time.monotonic() - until
                if result is None and late_s >= 0 and (not ready or late_s >= _ARRIVING_S):
                    if until == deadline:
                        self._error = TimeoutError(f"no reply within {self._patience_s:.3g} s")
                        break
                    self._hedge()
            if result is not None:
                return result
        finally:
            for connection in self._flying:
                self._channel.connections.drop(connection)
            self._flying.clear()
        if self._function_is_to_blame():
            self._channel.breaker.failed()
        raise ExpertUnavailableError(f"{self._channel.name}: {self._error!r}") from self._error

    def _take_over(self, posted: Posted) -> None:
        """Go on with a call that left within a step."""
        connection, connections = posted.connection, self._channel.connections
        self._sent_at -= posted.waited_s
        connections.claim(connection)
        self._expect(connection)
        try:
            if posted.broken:
                raise ConnectionResetError("the connection ended before the reply")
            connection.go_on(posted.received)
            self._flying.append(connection)
        except BROKEN as error:
            connections.drop(connection)
            self._broke(error)

    def _expect(self, connection: HttpConnection) -> None:
        """Note whom the call is sent to, and when that one is late."""
        self._asked.append(connection.replica)
        if connection.replica and self._channel.warm and len(self._asked) == 1:
            late_s = self._channel.hedge_delay.seconds(self._call.offsets[-1])
            self._hedge_at = math.inf if late_s is None else self._sent_at + late_s

    def _launch(self) -> None:
        """Send the call, to a replica that was not asked yet if one is known."""
        connections = self._channel.connections
        connection = None
        try:
            connection = connections.take(avoid=self._asked)
            self._expect(connection)
            connection.send(self._head, self._body)
            while connection.sending and wait_for([connection], _PUMP_S) and connection.flush():
                pass
            self._flying.append(connection)
        except BROKEN as error:
            if connection is not None:
                connections.drop(connection)
            self._broke(error)

    def _broke(self, error: Exception) -> None:
        """Try once more, unless that was done or another connection may still bring a reply."""
        self._error = error
        self._hedge_at = math.inf
        if self._flying or self._retries or self._hedges:
            return
        self._retries = 1
        _log.warning(
            "expert_call_retried",
            function=self._channel.name,
            layer=self._call.layer,
            error=repr(error),
        )
        self._launch()

    def _hedge(self) -> None:
        self._hedge_at = math.inf
        self._hedges = 1
        self._channel.hedge_delay.spend()
        _log.info("expert_call_hedged", function=self._channel.name, layer=self._call.layer)
        self._launch()

    def _take(self, ready: list[HttpConnection]) -> RemoteResult | None:
        """Take what has come on these; the first result."""
        for connection in ready:
            result = self._advance(connection)
            if result is not None:
                return result
        return None

    def _advance(self, connection: HttpConnection) -> RemoteResult | None:
        """Take what has come on a connection; the result, if that was a good reply's end."""
        try:
            reply = connection.advance()
            if reply is None:
                return None
            result = self._read(reply, connection.replica)
        except _RefusedError as refusal:
            self._error = refusal
            self._land(connection)
            return None
        except BROKEN as error:
            self._flying.remove(connection)
            self._channel.connections.drop(connection)
            self._broke(error)
            return None
        self._land(connection)
        self._channel.answered()
        line = self._channel.line
        if line is not None and self._call.rows == 1:
            line.learn(connection, connection.reply_bytes, result.partial)
        if not (self._hedges or self._retries or result.cold_start_s):
            latency_s = time.monotonic() - self._sent_at
            self._channel.hedge_delay.record(self._call.offsets[-1], latency_s)
        return result

    def _land(self, connection: HttpConnection) -> None:
        self._flying.remove(connection)
        self._channel.connections.give_back(connection)

    def _read(self, reply: HttpReply, replica: str) -> RemoteResult:
        if reply.status != _OK:
            raise _refusal(reply)
        try:
            answer = _reply_decoder.decode(reply.body)
        except msgspec.DecodeError as error:
            raise BrokenReplyError(f"not an expert's reply: {error}") from error
        wanted_bytes = (
            len(self._call.hidden) // ITEM_BYTES[self._call.dtype] * ITEM_BYTES["float32"]
        )
        if len(answer.partial) != wanted_bytes:
            raise BrokenReplyError(
                f"{len(answer.partial)} bytes of partial sums instead of {wanted_bytes}"
            )
        attempts = 1 + self._hedges + self._retries
        return RemoteResult(
            partial=answer.partial,
            # What the slower replica computed is the same: nobody waits to hear how long it took.
            busy_s=answer.busy_s * (1 + self._hedges),
            cold_start_s=max(0.0, time.monotonic() - self._sent_at - answer.ready_for_s),
            retries=self._retries,
            hedges=self._hedges,
            bytes_moved=attempts * len(self._body) + len(reply.body),
            replica=replica,
        )

    def _function_is_to_blame(self) -> bool:
        if isinstance(self._error, TimeoutError):
            return self._patience_s >= min(_FAIR_WAIT_S, self._channel.timeout_s)
        return not (isinstance(self._error, _RefusedError) and self._error.code in _ABOUT_THE_CALL)


def _refusal(reply: HttpReply) -> _RefusedError:
    try:
        failure = _failure_decoder.decode(reply.body)
    except msgspec.DecodeError:
        return _RefusedError(f"HTTP {reply.status}")
    return _RefusedError(f"{failure.code}: {failure.message}", failure.code)


class HttpTransport:
    """One channel per expert function; used from the engine's thread alone.

    `timeout_s` bounds a call whatever its deadline, a cold start included; no reply is called late
    before `hedge_floor_s`. `token` is what the functions ask for. `clock` is for what is remembered between calls.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        timeout_s: float,
        hedge_floor_s: float = 0.02,
        payload_limit_bytes: int = MAX_BODY_BYTES,
        token: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.beside = on_this_machine(topology.experts)
        self._polling = IdlePolling() if self.beside else None
        self._channels = {
            layer: channel
            for endpoint in topology.experts
            for channel in [
                Channel(
                    endpoint,
                    timeout_s=timeout_s,
                    hedge_floor_s=hedge_floor_s,
                    body_limit_bytes=payload_limit_bytes,
                    token=token,
                    clock=clock,
                    polling=self._polling,
                )
            ]
            for layer in range(endpoint.first_layer, endpoint.last_layer + 1)
        }

    def send(
        self,
        call: ExpertCall,
        *,
        deadline_s: float | None = None,
        traceparent: str | None = None,
    ) -> PendingReply:
        return _HttpPending(self._channels[call.layer], call, deadline_s, traceparent)

    def line(self, layer: int, shape: RowShape) -> ExpressLine | None:
        channel = self._channels[layer]
        if channel.polling is None:
            return None
        if channel.line is None:
            channel.line = ExpressLine(channel, shape, partial(_HttpPending, channel))
        return channel.line if channel.line.shape == shape else None

    def replicas(self, layer: int) -> int:
        """Known ones, while the function is warm; each time it is asked it may look for more."""
        channel = self._channels[layer]
        if not channel.warm:
            return 1
        channel.connections.look_for_replicas()
        return max(1, channel.connections.replicas)

    def close(self) -> None:
        for channel in self._channels.values():
            channel.connections.close()
        if self._polling is not None:
            self._polling.close()
