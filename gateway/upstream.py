"""Connections to the functions behind the gateway, which notice by themselves that a peer is gone."""

from __future__ import annotations

import socket

import aiohttp
from aiohttp import AddrInfoType

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
    )


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
