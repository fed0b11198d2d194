"""The listening sockets that outlive every replica."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from pathlib import Path

from remoe.errors import SettingsError
from remoe.topology import socket_url

__all__ = ["LOOPBACK", "address_of", "check_port", "listen", "listen_here"]

_BACKLOG = 2048
_POLL_S = 0.1


LOOPBACK = "127.0.0.1"


def check_port(port: int, host: str = LOOPBACK) -> None:
    """Raise SettingsError if the port cannot be had now."""
    _listen(host, port).close()


async def listen(port: int, *, patience_s: float, host: str = LOOPBACK) -> socket.socket:
    """Listen on an IP address, port 0 for any; a taken port is tried again for `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _listen(host, port)
        except SettingsError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(_POLL_S)


def listen_here(path: Path) -> socket.socket:
    """Listen where only processes of this machine can call that may enter the path's folder."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {path}: {error.strerror}. Set REMOE_HOME to another folder."
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Its URL."""
    if listener.family == socket.AF_UNIX:
        return socket_url(Path(listener.getsockname()))
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno or errno.EINVAL).lower()
        raise SettingsError(
            f"cannot listen on {host} port {port}: {reason}. Choose another with --port or --host."
        ) from error
    return listener
