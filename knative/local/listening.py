"""The listening sockets that outlive every replica."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time

from remoe.errors import SettingsError

__all__ = ["check_port", "listen"]

_BACKLOG = 2048
_POLL_S = 0.1


def check_port(port: int) -> None:
    """Raise SettingsError if the port cannot be had now."""
    _listen(port).close()


async def listen(port: int, *, patience_s: float) -> socket.socket:
    """Listen on 127.0.0.1, port 0 for any; a taken port is tried again for `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _listen(port)
        except SettingsError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(_POLL_S)


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno or errno.EINVAL).lower()
        raise SettingsError(
            f"cannot listen on port {port}: {reason}. Choose another with --port."
        ) from error
    return listener
