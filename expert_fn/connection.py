"""One client's connection: httptools reads the requests, the endpoint answers them in order."""

from __future__ import annotations

import socket

import httptools

from expert_fn.endpoint import Endpoint, Response
from remoe.lifecycle import InFlight

__all__ = ["Connection"]


class Connection:
    """Bytes in and out of a socket that never blocks.

    httptools calls the `on_*` methods while `receive` feeds it.
    """

    def __init__(self, client: socket.socket, endpoint: Endpoint, in_flight: InFlight) -> None:
        client.setblocking(False)
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = client
        self._endpoint = endpoint
        self._in_flight = in_flight
        if endpoint.asks_for_credentials:
            # Only then: the parser calls it for every header, which nobody else reads.
            self.on_header = self._keep_credentials
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._unsent = memoryview(b"")
        self._credentials = b""
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
        self._credentials = b""

    def _keep_credentials(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._credentials = value

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= self._endpoint.payload_limit_bytes:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._in_flight.enter()
        try:
            self._keep_alive = self._parser.should_keep_alive()
            self._write(self._answer())
        finally:
            self._in_flight.leave()
        self._reading = False

    def _answer(self) -> Response:
        if self._body_bytes > self._endpoint.payload_limit_bytes:
            return self._endpoint.refuse_body(self._body_bytes)
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        return self._endpoint.handle(self._parser.get_method(), self._url, body, self._credentials)

    def _write(self, response: Response) -> None:
        """Head and body leave together: as two packets, the second would wait for an answer."""
        close = b"" if self._keep_alive else b"connection: close\r\n"
        answer = b"%bcontent-length: %d\r\n%b\r\n%b" % (
            self._endpoint.head(response),
            len(response.body),
            close,
            response.body,
        )
        self._unsent = memoryview(bytes(self._unsent) + answer if self._unsent else answer)
        self.flush()
