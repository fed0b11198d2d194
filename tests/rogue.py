"""A server between a caller and a real expert function that does one thing wrong at a time."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Literal, Self

import msgspec

from remoe.expert_call import ExpertReply

Fault = Literal[
    "garbage",
    "not_msgpack",
    "short",
    "endless",
    "dribbles",
    "closes",
    "resets",
    "silent",
    "unavailable",
]


class Rogue:
    """Answers wrongly while `fault` is set, and hands bytes on to `port` while it is None.

    Connections stay open between calls, so that a fault can come on one that worked before.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.fault: Fault | None = None
        self.faults_left = 1 << 30
        self.faults = 0
        self.connections = 0
        self.requests: list[bytes] = []
        self._over = threading.Event()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                self._open.append(client)
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            client,
            socket.create_connection(("127.0.0.1", self._upstream)) as upstream,
        ):
            while request := client.recv(1 << 20):
                if self.fault is not None and self.faults_left:
                    self.faults_left -= 1
                    self.faults += 1
                    if self._misbehave(client):
                        return
                    continue
                self.requests.append(request)
                upstream.sendall(request)
                client.sendall(_whole_response(upstream))

    def _misbehave(self, client: socket.socket) -> bool:  # noqa: C901  # a case a fault
        """Do it; whether the connection is over."""
        match self.fault:
            case "garbage":
                client.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            case "not_msgpack":
                client.sendall(_response(b"<html>hello</html>"))
            case "short":
                reply = ExpertReply(partial=bytes(4), busy_s=0.1, ready_for_s=1e3)
                client.sendall(_response(msgspec.msgpack.encode(reply)))
            case "endless":
                client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
                while True:  # until the caller has had enough
                    client.sendall(bytes(1 << 16))
            case "dribbles":
                client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
                while not self._over.wait(0.002):
                    client.sendall(b"x")
            case "closes":
                return True
            case "resets":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return True
            case "unavailable":
                client.sendall(_response(b"no replica", status=b"503 Service Unavailable"))
            case _:
                pass  # silent, as after a cable is pulled: neither an answer nor an end
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._open:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=5)


def _response(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def _whole_response(upstream: socket.socket) -> bytes:
    data = upstream.recv(1 << 20)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"content-length" in line
    )
    while len(body) < length:
        body += upstream.recv(1 << 20)
    return head + b"\r\n\r\n" + body
