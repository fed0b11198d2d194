"""One client's connection: httptools reads the requests, the endpoint answers them in order."""

from __future__ import annotations

import socket
from http import HTTPStatus

import httptools

from expert_fn.endpoint import Endpoint, Response
from remoe.lifecycle import READY_FOR_HEADER, REPLICA_HEADER, InFlight

__all__ = ["Connection"]

_STATUS_LINE = {
    status: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class Connection:
    """Bytes in and out of a socket that never blocks.

    httptools calls the `on_*` methods while `receive` feeds it.
    """

    def __init__(self, client: socket.socket, endpoint: Endpoint, in_flight: InFlight) -> None:
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = client
        self._endpoint = endpoint
        self._in_flight = in_flight
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._unsent = memoryview(b"")
        self._reading = False
        self._keep_alive = True

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def sending(self) -> bool:
        """Whether part of an answer waits for the client to read."""
        return bool(self._unsent)

    @property
    def busy(self) -> bool:
        """Whether a request has begun and its answer has not wholly left."""
        return self._reading or self.sending

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come either way."""
        return not (self._keep_alive or self.sending)

    def receive(self, buffer: memoryview) -> None:
        """Take what has arrived, at most `buffer`; raises ConnectionError when the client left."""
        size = self._socket.recv_into(buffer)
        if not size:
            raise ConnectionResetError("the client closed the connection")
        try:
            self._parser.feed_data(buffer[:size])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._keep_alive:
                self._keep_alive = False
                self._write(self._endpoint.refuse_syntax())

    def flush(self) -> None:
        """Send what the client has room for."""
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        self._unsent = self._unsent[sent:]

    def close(self) -> None:
        self._socket.close()

    def on_message_begin(self) -> None:
        self._reading = True
        self._url = b""
        self._body = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= self._endpoint.payload_limit_bytes:
            self._body.append(body)

    def on_message_complete(self) -> None:
        with self._in_flight.request():
            if self._body_bytes > self._endpoint.payload_limit_bytes:
                response = self._endpoint.refuse_body(self._body_bytes)
            else:
                path = httptools.parse_url(self._url).path
                body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
                response = self._endpoint.handle(self._parser.get_method(), path, body)
            self._keep_alive = self._parser.should_keep_alive()
            self._write(response)
        self._reading = False

    def _write(self, response: Response) -> None:
        """Head and body leave together: as two packets, the second would wait for an answer."""
        head = (
            f"content-type: {response.content_type}\r\n"
            f"content-length: {len(response.body)}\r\n"
            f"{READY_FOR_HEADER}: {self._endpoint.ready_for_ms:.1f}\r\n"
            f"{REPLICA_HEADER}: {self._endpoint.replica}\r\n"
            f"connection: {'keep-alive' if self._keep_alive else 'close'}\r\n\r\n"
        )
        answer = _STATUS_LINE[response.status] + head.encode() + response.body
        self._unsent = memoryview(bytes(self._unsent) + answer if self._unsent else answer)
        self.flush()
