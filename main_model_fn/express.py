"""Calls of one row that leave and return within a native step (kernel/native/express.h).

While one stream decodes, a layer whose experts are partly in a function of this machine waits on
whatever runs between its router and its next layer: Python's part of that, out of the caches each
time, was a fifth of the wait. Here are requests made in advance, and a reply as it was the last
time; a reply that is in any way different, late, or does not come, is a call like any other that
was sent already, and its retries and hedges are too.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from main_model_fn.http_connection import HttpConnection, head_of
from main_model_fn.transport import PendingReply, RemoteResult
from remoe.expert_call import ITEM_BYTES, ExpertCall, RowDtype
from remoe.kernel.structures import BROKEN, Line, Request

if TYPE_CHECKING:
    from main_model_fn.http_channel import Channel

__all__ = ["ExpressLine", "Posted", "RowShape"]

_encoder = msgspec.msgpack.Encoder()
# What MessagePack writes in 3 bytes, the first of which says so.
_ANY_NUMBER = 0xFFFF
_NUMBER = b"\xcd\xff\xff"
_DOUBLE = 0xCB
_TIMES_BYTES = 2 * 9
# Longer than a warm call takes; who waits longer does so where a second replica can be asked.
_MOST_PATIENCE_S = 0.02


class RowShape(NamedTuple):
    """What calls of one row of a model have in common."""

    model_digest: str
    dtype: RowDtype
    width: int
    top_k: int


class Posted(NamedTuple):
    """A call that left within a step and whose reply did not come as expected.

    `received` is what has come of it so far; `broken` says that its connection is of no more use.
    """

    connection: HttpConnection
    received: bytes
    broken: bool
    waited_s: float


class TakeOver(Protocol):
    def __call__(
        self, call: ExpertCall, deadline_s: float | None, *, posted: Posted
    ) -> PendingReply: ...


class ExpressLine:
    """To one function, for rows of one shape. Used from the engine's thread alone."""

    def __init__(self, channel: Channel, shape: RowShape, take_over: TakeOver) -> None:
        self.shape = shape
        self._take_over = take_over
        self._channel = channel
        self._connection: HttpConnection | None = None
        self._known = b""
        made = [_request(channel.head, shape, count + 1) for count in range(shape.top_k)]
        self._body_bytes = [size for _, _, size in made]
        self._bytes = [held for held, _, _ in made]  # the library has their addresses
        self._requests = (Request * shape.top_k)(*(request for _, request, _ in made))
        self._partial_bytes = shape.width * ITEM_BYTES["float32"]
        self._reply = np.empty(0, np.uint8)
        self._reply_body_bytes = 0
        self._line = Line(
            descriptor=-1, requests=shape.top_k, request=ctypes.addressof(self._requests)
        )

    @property
    def address(self) -> int:
        """Of the library's `struct line`."""
        return ctypes.addressof(self._line)

    def open(self, now: float, remaining_s: float | None) -> None:
        """Let a step use it, if a connection is there whose replies are known.

        `remaining_s` is how long an answer is of use, None without end.
        """
        line, channel = self._line, self._channel
        polling = channel.polling
        line.descriptor = -1
        if line.missed and polling is not None:
            polling.rest(now)
            line.missed = 0
        connection = channel.connections.next
        if connection is None or connection is not self._connection:
            return
        late_s = channel.hedge_delay.seconds(1)
        patience_s = min(
            _MOST_PATIENCE_S if late_s is None else late_s,
            _MOST_PATIENCE_S if remaining_s is None else remaining_s,
            _MOST_PATIENCE_S,
        )
        if patience_s <= 0 or not (channel.warm and channel.breaker.allows):
            return
        line.patience_ns = int(patience_s * 1e9)
        line.polling = polling and polling.handle(now)
        line.descriptor = connection.fileno()

    def close(self) -> None:
        """Have the next step call as any other does."""
        self._line.descriptor = -1

    def learn(self, connection: HttpConnection, reply: bytes, partial: bytes) -> None:
        """Note how this connection's replies look: one to a call of one row, whole, and its sum."""
        at = len(reply) - _TIMES_BYTES - self._partial_bytes
        known = (
            at > 0
            and reply[at : at + self._partial_bytes] == partial
            and reply[-18] == reply[-9] == _DOUBLE
        )
        self._connection = connection if known else None
        if not known or reply[:at] == self._known:
            return
        self._known = self._line.reply_head = reply[:at]
        self._line.reply_head_size = at
        self._reply_body_bytes = len(reply) - len(reply.partition(b"\r\n\r\n")[0]) - 4
        self._reply = np.empty(len(reply) + 1, np.uint8)
        self._line.reply, self._line.reply_room = self._reply.ctypes.data, len(self._reply)

    def result(self, answer: np.void) -> RemoteResult:
        """Of a call that was answered, but for its partial sums, which the step has added."""
        waited_s, channel = float(answer["waited_s"]), self._channel
        cold_start_s = max(0.0, waited_s - float(answer["ready_for_s"]))
        routes = int(answer["routes"])
        channel.answered()
        if not cold_start_s:
            channel.hedge_delay.record(routes, waited_s)
        connection = self._connection
        return RemoteResult(
            partial=b"",
            busy_s=float(answer["busy_s"]),
            cold_start_s=cold_start_s,
            retries=0,
            hedges=0,
            bytes_moved=self._body_bytes[routes - 1] + self._reply_body_bytes,
            replica="" if connection is None else connection.replica,
        )

    def pending(
        self, call: ExpertCall, answer: np.void, *, deadline_s: float | None
    ) -> PendingReply:
        """A call that left and was not answered as expected; replies are then to be learnt again."""
        connection, self._connection = self._connection, None
        if connection is None:
            raise ValueError("no call has left by this line")
        posted = Posted(
            connection,
            received=self._reply[: max(0, int(answer["received"]))].tobytes(),
            broken=int(answer["state"]) == BROKEN,
            waited_s=float(answer["waited_s"]),
        )
        return self._take_over(call, deadline_s, posted=posted)


def _request(head: bytes, shape: RowShape, experts: int) -> tuple[NDArray[np.uint8], Request, int]:
    """A whole request, where what differs from call to call lies in it, and its body's size."""
    row = b"\xfe" * (shape.width * ITEM_BYTES[shape.dtype])
    gate = b"\xfd" * (experts * ITEM_BYTES["float32"])
    body = _encoder.encode(
        ExpertCall(
            model_digest=shape.model_digest,
            layer=_ANY_NUMBER,
            dtype=shape.dtype,
            rows=1,
            hidden=row,
            experts=[_ANY_NUMBER] * experts,
            offsets=list(range(experts + 1)),
            row_index=bytes(experts * 4),
            gate=gate,
            near=True,
        )
    )
    start = head_of(head, len(body))
    whole = start + body
    hidden_at = whole.index(row, len(start))
    request = np.frombuffer(whole, np.uint8).copy()
    return (
        request,
        Request(
            bytes=request.ctypes.data,
            size=len(whole),
            layer_at=whole.index(_NUMBER, len(start)) + 1,
            hidden_at=hidden_at,
            experts_at=whole.index(_NUMBER, hidden_at + len(row)) + 1,
            gate_at=whole.index(gate, hidden_at + len(row)),
            beside_at=len(whole) - 2,
        ),
        len(body),
    )
