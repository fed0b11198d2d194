"""Connections to the functions behind the gateway, which notice by themselves that a peer is gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any

import aiohttp
from aiohttp import AddrInfoType
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection

__all__ = ["DEAD_AFTER_S", "open_upstream"]

DEAD_AFTER_S = 15
"""A peer whose machine or network is gone is given up after this long, answering or not."""

_PROBE_PERIOD_S = 5
# Functions behind us keep idle connections longer (75 s), so we close first.
_KEEP_ALIVE_S = 30
_MOST_CONNECTIONS = 2048


def open_upstream(*, fresh: bool = False) -> aiohttp.ClientSession:
    """One pool for all of them, or `fresh` connections that are used once.

    Time is limited where it is known what for: a cold start may well take minutes.
    """
    connector = aiohttp.TCPConnector(
        limit=_MOST_CONNECTIONS,
        force_close=fresh,
        keepalive_timeout=None if fresh else _KEEP_ALIVE_S,
        socket_factory=_socket,
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    return aiohttp.ClientSession(
        timeout=timeout,
        connector=connector,
        auto_decompress=False,
        # What services of ours never look at is not worth its time.
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("accept", "accept-encoding", "user-agent"),
        request_class=_ImmediateRequest,
    )


class _ImmediateRequest(aiohttp.ClientRequest):
    """A request that leaves when it is made.

    aiohttp writes the body, and the head with it, in a task of its own. Python starts that at once
    from 3.12 on; before, it would stand behind all that the event loop has to do by then.
    """

    def write_bytes(
        self,
        writer: AbstractStreamWriter,
        conn: Connection,
        content_length: int | None = None,
    ) -> Coroutine[Any, Any, None]:
        if conn.transport is not None:
            # uvloop keeps what is written until the end of its turn, but for what is too much.
            conn.transport.set_write_buffer_limits(high=0)
        writing = super().write_bytes(writer, conn, content_length)
        try:
            waits_for = writing.send(None)
        except StopIteration:
            return asyncio.sleep(0)
        return _go_on(writing, waits_for)


@coroutine
def _go_on(begun: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine that has begun to wait, for a task to run."""
    while True:
        step: Callable[[Any], Any] = begun.send
        try:
            given = yield waits_for
        except BaseException as error:  # noqa: BLE001  # a cancellation too is the coroutine's
            step, given = begun.throw, error
        try:
            waits_for = step(given)
        except StopIteration:
            return


def _socket(address: AddrInfoType) -> socket.socket:
    """One that probes a silent peer, and fails when nothing it sent is acknowledged."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_PERIOD_S),
        ("TCP_KEEPINTVL", _PROBE_PERIOD_S),
        ("TCP_KEEPCNT", DEAD_AFTER_S // _PROBE_PERIOD_S - 1),
        ("TCP_USER_TIMEOUT", DEAD_AFTER_S * 1000),
    ):
        if hasattr(socket, name):  # not everywhere
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made
