"""A small HTTP/1.1 server on asyncio and httptools: one endpoint, computed one call at a time.

A framework would be half of the cold start (docs/adr/0002-expert-protocol.md). Parsing is
llhttp's, through httptools; nothing here reads HTTP syntax.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

import httptools
import msgspec

from expert_fn.compute import ExpertComputer, RefusedCallError
from remoe.expert_call import (
    CONTENT_TYPE,
    MAX_BODY_BYTES,
    PATH,
    ExpertCall,
    ExpertFailure,
    ExpertReply,
    FailureCode,
)
from remoe.lifecycle import READY_FOR_HEADER, InFlight, Notifier

__all__ = ["serve"]

_log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ExpertCall)
_DRAIN_S = 0.05
_STATUS: dict[FailureCode, HTTPStatus] = {
    "wrong_model": HTTPStatus.CONFLICT,
    "wrong_shape": HTTPStatus.BAD_REQUEST,
    "unknown_expert": HTTPStatus.NOT_FOUND,
    "body_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "malformed": HTTPStatus.BAD_REQUEST,
    "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
}


class Response(NamedTuple):
    status: HTTPStatus
    body: bytes
    content_type: str = CONTENT_TYPE


class Endpoint:
    """Routes a parsed request; knows nothing of connections."""

    def __init__(self, computer: ExpertComputer, notifier: Notifier) -> None:
        self._computer = computer
        self._notifier = notifier

    def handle(self, method: str, path: str, body: bytes) -> Response:  # noqa: PLR0911
        if path in {"/healthz", "/readyz"}:
            return Response(HTTPStatus.OK, b"ok\n", "text/plain")
        if path != PATH:
            return _failure("malformed", f"no such path; calls go to {PATH}", HTTPStatus.NOT_FOUND)
        if method != "POST":
            return _failure("malformed", "use POST", HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            return self._compute(_decoder.decode(body))
        except msgspec.DecodeError as error:
            return _failure("malformed", f"the body is not an expert call: {error}")
        except RefusedCallError as error:
            _log.warning("expert_call_refused", extra={"code": error.code, "reason": error.message})
            return _failure(error.code, error.message)
        except Exception:  # noqa: BLE001  # a bug costs this call, not the function
            _log.exception("expert_call_failed")
            return _failure("internal", "the function failed; its log says why")

    def _compute(self, call: ExpertCall) -> Response:
        began = time.perf_counter()
        partial = self._computer.compute(call)
        reply = ExpertReply(
            partial=partial.astype("<f4", copy=False).tobytes(),
            busy_s=time.perf_counter() - began,
            ready_for_s=self._notifier.ready_for_s,
        )
        return Response(HTTPStatus.OK, _encoder.encode(reply))

    @property
    def ready_for_ms(self) -> float:
        return self._notifier.ready_for_s * 1e3


def _failure(code: FailureCode, message: str, status: HTTPStatus | None = None) -> Response:
    body = _encoder.encode(ExpertFailure(code=code, message=message))
    return Response(status or _STATUS[code], body)


class Connection(asyncio.Protocol):
    """One client. httptools calls the `on_*` methods while `data_received` feeds it."""

    def __init__(self, endpoint: Endpoint, in_flight: InFlight, peers: set[Connection]) -> None:
        self._endpoint = endpoint
        self._in_flight = in_flight
        self._peers = peers
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self.reading = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  # what create_server makes
        self._transport = transport
        self._peers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._peers.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._write(_failure("malformed", "this is not HTTP/1.1"), keep_alive=False)

    def on_message_begin(self) -> None:
        self.reading = True
        self._url = b""
        self._body = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= MAX_BODY_BYTES:
            self._body.append(body)

    def on_message_complete(self) -> None:
        with self._in_flight.request():
            if self._body_bytes > MAX_BODY_BYTES:
                message = f"{self._body_bytes} bytes; the limit is {MAX_BODY_BYTES}"
                response = _failure("body_too_large", message)
            else:
                path = httptools.parse_url(self._url).path.decode("latin-1")
                method = self._parser.get_method().decode("latin-1")
                response = self._endpoint.handle(method, path, b"".join(self._body))
            self._write(response, keep_alive=self._parser.should_keep_alive())
        self.reading = False

    def _write(self, response: Response, *, keep_alive: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        head = (
            f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
            f"content-type: {response.content_type}\r\n"
            f"content-length: {len(response.body)}\r\n"
            f"{READY_FOR_HEADER}: {self._endpoint.ready_for_ms:.1f}\r\n"
            f"connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
        )
        self._transport.write(head.encode("latin-1") + response.body)
        if not keep_alive:
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def serve(
    listener: socket.socket,
    load: Callable[[], ExpertComputer],
    notifier: Notifier,
    in_flight: InFlight,
) -> None:
    """Serve until SIGTERM or SIGINT, then close: calls are computed whole, so none is cut."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    endpoint = Endpoint(load(), notifier)
    peers: set[Connection] = set()
    server = await loop.create_server(lambda: Connection(endpoint, in_flight, peers), sock=listener)
    notifier.ready()
    await stop.wait()
    notifier.stopping()
    server.close()
    # A call that was under way to us when we stopped listening is still read and answered.
    deadline = loop.time() + 20 * _DRAIN_S
    await asyncio.sleep(_DRAIN_S)
    while any(peer.reading for peer in peers) and loop.time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_DRAIN_S)
    for peer in list(peers):
        peer.close()
