"""Receives the replicas' sd_notify datagrams, and knows from the kernel who sent each."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping

__all__ = ["Inbox"]

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_MOST_BYTES = 8192
_BATCH = 64


class Inbox:
    """Calls `deliver(pid, fields)` for each datagram. `address` goes into NOTIFY_SOCKET.

    The socket is in the abstract name space: no file to leave behind and no limit on the run
    directory's length. Anyone may send to it, so senders are told apart by their process id.
    """

    def __init__(self, deliver: Callable[[int, Mapping[str, str]], None]) -> None:
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self.address = f"@remoe-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + self.address[1:])
        self._loop.add_reader(self._socket, self._receive)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _receive(self) -> None:
        for _ in range(_BATCH):
            try:
                data, ancillary, _, _ = self._socket.recvmsg(
                    _MOST_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                return
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    pid, _, _ = _CREDENTIALS.unpack(payload)
                    lines = data.decode(errors="replace").splitlines()
                    pairs = (line.partition("=") for line in lines)
                    self._deliver(pid, {name: value for name, _, value in pairs})
