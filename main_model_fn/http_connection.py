"""One kept-alive HTTP/1.1 connection that never blocks its caller; httptools reads the replies."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import httptools

from remoe.kernel.idle_polling import IdlePolling
from remoe.lifecycle import REPLICA_HEADER
from remoe.topology import socket_path

__all__ = [
    "BROKEN",
    "BrokenReplyError",
    "HttpAddress",
    "HttpConnection",
    "HttpReply",
    "head_of",
    "wait_for",
]

_REPLICA_HEADER = REPLICA_HEADER.encode()
_OK = int(HTTPStatus.OK)


class BrokenReplyError(Exception):
    """What came is not the reply to what was sent."""


# What shows that a connection is of no more use.
BROKEN = (OSError, BrokenReplyError, httptools.HttpParserError, httptools.HttpParserUpgrade)


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Where a function listens: at a port of a host, or at a socket's `path` on this machine."""

    host: str
    port: int
    path: str = ""

    @classmethod
    def of(cls, url: str) -> Self:
        """As a topology names it."""
        path = socket_path(url)
        if path is not None:
            return cls("localhost", 80, path)
        parts = urlsplit(url)
        return cls(parts.hostname or "127.0.0.1", parts.port or 80)

    def connect(self) -> socket.socket:
        """A socket that never blocks, and need not be connected yet; raises OSError."""
        family, where = self._where()
        sock = socket.socket(family)
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex(where)
        if error not in {0, errno.EINPROGRESS}:
            sock.close()
            raise OSError(error, os.strerror(error))
        return sock

    def _where(self) -> tuple[socket.AddressFamily, str | tuple[object, ...]]:
        if self.path:
            return socket.AF_UNIX, self.path
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
        return family, where

    def request(self, method: str, path: str, **headers: str) -> bytes:
        """The head of a request, but for its Content-Length; `content_type` is Content-Type."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "".join(f"{line}\r\n" for line in lines).encode()


def head_of(head: bytes, body_bytes: int) -> bytes:
    """The whole head of a request, of what `HttpAddress.request` made."""
    return b"%bContent-Length: %d\r\n\r\n" % (head, body_bytes)


class HttpReply(NamedTuple):
    status: int
    body: bytes


class HttpConnection:
    """Sends one request at a time and takes its reply as it comes, `buffer` by `buffer`.

    `replica` names who answered last, empty before the first reply. Methods raise one of `BROKEN`
    when the connection is lost, or says what no reply says; it must then be closed.
    httptools calls the `on_*` methods.
    """

    def __init__(self, sock: socket.socket, buffer: memoryview, body_limit_bytes: int) -> None:
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._parser = httptools.HttpResponseParser(self)
        self._limit_bytes = body_limit_bytes
        self._buffer = buffer
        self._unsent = memoryview(b"")
        self._waiting = False
        self._fresh = False  # whether nothing of the reply has come
        self._at_once = 0
        self._status = 0
        self._chunks: list[bytes] = []
        self._body_bytes = 0
        self._reply: HttpReply | None = None
        self.keep_alive = True
        self.replica = ""
        self._replica = b""

    @classmethod
    def open(cls, address: HttpAddress, buffer: memoryview, body_limit_bytes: int) -> Self:
        """Begin to connect, without waiting until that is done; raises OSError."""
        return cls(address.connect(), buffer, body_limit_bytes)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def sending(self) -> bool:
        """Whether part of the request has not left."""
        return bool(self._unsent)

    @property
    def quiet(self) -> bool:
        """Whether it is idle and alive: nothing to read, which could only be its end."""
        return self.keep_alive and not self._waiting and not self.readable(0)

    def readable(self, timeout_ms: float) -> bool:
        """Whether anything has come, or comes within the time."""
        return bool(self._poll.poll(timeout_ms))

    def send(self, head: bytes, body: bytes = b"") -> None:
        """Send a request made by `HttpAddress.request`, or as much of it as there is room for."""
        head = head_of(head, len(body))
        self._waiting = self._fresh = True
        self._reply = None
        try:
            # Together: as two packets, the second would wait until the first is acknowledged.
            sent = self._socket.sendmsg([head, body])
        except BlockingIOError:
            sent = 0
        if sent < len(head) + len(body):
            self._unsent = memoryview(head + body)[sent:]

    def go_on(self, received: bytes) -> None:
        """Take the reply to a request that was sent on this connection otherwise."""
        self._waiting, self._fresh = True, not received
        self._at_once = 0
        self._reply = None
        if received:
            self._parser.feed_data(received)

    @property
    def reply_bytes(self) -> bytes:
        """Of the reply that `advance` has just returned, if it came at once; or else nothing."""
        return bytes(self._buffer[: self._at_once])

    def flush(self) -> bool:
        """Send what there is room for of what has not left; whether that was anything."""
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return False
        self._unsent = self._unsent[sent:]
        return sent > 0

    def advance(self) -> HttpReply | None:
        """Send and take what can be sent and taken now; the reply, once it is whole."""
        if self._unsent:
            self.flush()
        try:
            size = self._socket.recv_into(self._buffer)
        except BlockingIOError:
            return self._reply
        if not size:
            raise ConnectionResetError("the connection ended before the reply")
        self._at_once = size if self._fresh else 0
        self._fresh = False
        self._parser.feed_data(self._buffer[:size])
        if self._reply is not None and self._unsent:
            self.keep_alive = False  # answered before it had read all: out of step from now on
        return self._reply

    def close(self) -> None:
        self._socket.close()

    def on_message_begin(self) -> None:
        if not self._waiting:
            raise BrokenReplyError("a reply that nothing asked for")
        self._chunks = []
        self._body_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        known = name == _REPLICA_HEADER or name.lower() == _REPLICA_HEADER
        if known and value != self._replica:
            self._replica, self.replica = value, value.decode("latin-1")

    def on_body(self, chunk: bytes) -> None:
        self._body_bytes += len(chunk)
        if self._body_bytes > self._limit_bytes:
            raise BrokenReplyError(f"a reply of over {self._limit_bytes} bytes")
        self._chunks.append(chunk)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < _OK:
            return  # "100 Continue" and its like come before the reply
        self._waiting = False
        self.keep_alive = self._parser.should_keep_alive()
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._reply = HttpReply(status, body)


def wait_for(
    connections: Sequence[HttpConnection], timeout_s: float, polling: IdlePolling | None = None
) -> list[HttpConnection]:
    """Those on which something can be done, after at most `timeout_s`."""
    until = time.monotonic() + timeout_s
    if len(connections) == 1 and not connections[0].sending:
        (only,) = connections
        if polling is not None and polling.wait(only.fileno(), timeout_s):
            return [only]
        return [only] if only.readable(1e3 * max(0.0, until - time.monotonic())) else []
    poll = select.poll()
    by_fd = {}
    for connection in connections:
        events = select.POLLIN | select.POLLOUT if connection.sending else select.POLLIN
        by_fd[connection.fileno()] = connection
        poll.register(connection, events)
    return [by_fd[fd] for fd, _ in poll.poll(1e3 * max(0.0, timeout_s))]
