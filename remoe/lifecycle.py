"""How every Remoe program starts, says that it is ready, drains, and dies with its supervisor.

Sockets come by systemd's activation protocol (LISTEN_FDS, first one is descriptor 3). The process
that made the socket keeps it, so a connection that arrives while no replica runs, or while one
drains, waits in the kernel's backlog for the next. On a cluster there is no such socket and the
same program binds 0.0.0.0:$PORT.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from remoe.notify import InFlight, Notifier

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Message, Receive, Send], Awaitable[None]]

__all__ = [
    "LIFELINE_VARIABLE",
    "READY_FOR_HEADER",
    "REPLICA_HEADER",
    "START_HEADER",
    "InFlight",
    "Notifier",
    "bind",
    "loopback_only",
    "serve_asgi",
    "watch_lifeline",
]

# How long the replica had been ready when its response began, in milliseconds. A caller that
# waited longer than that waited for a cold start; no clock is compared with another machine's.
READY_FOR_HEADER = "x-remoe-ready-for-ms"
# What the replica's own start took, in milliseconds: "boot,load", from the process's creation to
# its app's start (interpreter and libraries), and from there until it was ready (the model).
START_HEADER = "x-remoe-start-ms"
# Tells replicas behind one address apart.
REPLICA_HEADER = "x-remoe-replica"
LIFELINE_VARIABLE = "REMOE_LIFELINE_FD"

_FIRST_INHERITED_FD = 3
_BACKLOG = 2048
_LIFELINE_GRACE_S = 5.0
# Between no longer accepting and closing idle connections: whoever has just connected, or has
# just written to a kept-alive connection, is still served.
_LINGER_S = 0.05
# Longer than the pools of the clients in front, so that they close idle connections, not we.
_KEEP_ALIVE_S = 75

_lifeline_lock = threading.Lock()
_watched_fds: set[int] = set()


def bind() -> socket.socket:
    """Take the inherited listening socket, or listen on 0.0.0.0:$PORT (8080 if unset)."""
    pid = os.environ.pop("LISTEN_PID", None)
    count = os.environ.pop("LISTEN_FDS", None)
    if count is not None and pid in {None, str(os.getpid())}:
        listener = socket.socket(fileno=_FIRST_INHERITED_FD)
        listener.set_inheritable(False)
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = os.environ.get("PORT", "8080")
        try:
            listener.bind(("0.0.0.0", int(port)))  # noqa: S104  # what Knative asks for
        except (OSError, ValueError, OverflowError) as error:
            listener.close()
            sys.exit(f"cannot listen on port {port}: {error}. Set PORT to a free port.")
        listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def loopback_only() -> bool:
    """Whether the socket that `bind` will take can be reached from this machine alone."""
    import ipaddress

    if os.environ.get("LISTEN_FDS") is None:
        return False  # $PORT is bound on all addresses
    with socket.socket(fileno=os.dup(_FIRST_INHERITED_FD)) as listener:
        if listener.family == socket.AF_UNIX:
            return True
        return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def watch_lifeline() -> None:
    """Exit soon after the supervisor is gone: SIGTERM to self, then a hard exit after 5 s.

    Call it before slow imports. A container, where there is no REMOE_LIFELINE_FD, ends with its
    first process, and the kernel drops that one's SIGTERM unless it has a handler: it gets one,
    until the server installs its own. Does nothing when called again.
    """
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    value = os.environ.get(LIFELINE_VARIABLE)
    if value is None:
        return
    fd = int(value)
    with _lifeline_lock:
        if fd in _watched_fds:
            return
        _watched_fds.add(fd)
    os.set_inheritable(fd, False)
    threading.Thread(target=_wait_for_end, args=(fd,), name="lifeline", daemon=True).start()


def _wait_for_end(fd: int) -> None:
    # Nobody ever writes: the read returns when the last copy of the other end has closed.
    with contextlib.suppress(OSError):
        while os.read(fd, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LIFELINE_GRACE_S)
    os._exit(1)


class _Metered:
    """ASGI middleware: counts requests in flight and adds READY_FOR_HEADER."""

    def __init__(self, app: App, notifier: Notifier, in_flight: InFlight) -> None:
        self._app = app
        self._notifier = notifier
        self._in_flight = in_flight
        self._header = READY_FOR_HEADER.encode()
        self._boot_s = _process_age_s()
        self._made_at = time.monotonic()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = True
        self._in_flight.enter()

        async def send_metered(message: Message) -> None:
            nonlocal counted
            if message["type"] == "http.response.start":
                ready_for_ms = self._notifier.ready_for_s * 1e3
                load_s = time.monotonic() - self._made_at - ready_for_ms / 1e3
                start_ms = f"{self._boot_s * 1e3:.0f},{load_s * 1e3:.0f}"
                added = [
                    (self._header, f"{ready_for_ms:.1f}".encode()),
                    (START_HEADER.encode(), start_ms.encode()),
                ]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)
            if (
                counted
                and message["type"] == "http.response.body"
                and not message.get("more_body", False)
            ):
                counted = False
                self._in_flight.leave()

        try:
            await self._app(scope, receive, send_metered)
        finally:
            # The client left, or the app failed, before the body ended.
            if counted:
                self._in_flight.leave()


def _process_age_s() -> float:
    """Seconds since this process was made; 0 where /proc cannot tell."""
    try:
        # The second field, the program's name, may itself contain spaces and brackets.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def serve_asgi(app: App, *, log_level: str, tls: tuple[Path, Path] | None = None) -> None:
    """Serve an ASGI app until SIGTERM or SIGINT, then finish what is in flight and return.

    `tls` is a certificate (with its chain) and its private key, in PEM; plain HTTP without.

    READY is sent when the app's lifespan start-up has completed and connections are accepted.
    """
    import asyncio

    import uvicorn

    from remoe.http_protocol import ServerProtocol

    watch_lifeline()
    listener = bind()
    notifier = Notifier.from_environment()
    in_flight = InFlight(notifier)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            notifier.ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            notifier.stopping()
            for server in self.servers:
                server.close()
            await asyncio.sleep(_LINGER_S)
            await super().shutdown(sockets=sockets)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn raises the signal again after a clean shutdown; a drained replica exits 0.
            def stop(signum: int, frame: FrameType | None) -> None:
                if not self.started:
                    os._exit(0)  # still loading: nothing was accepted, nothing is lost
                self.handle_exit(signum, frame)

            before = {sig: signal.signal(sig, stop) for sig in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for sig, handler in before.items():
                    signal.signal(sig, handler)

    config = uvicorn.Config(
        _Metered(app, notifier, in_flight),
        loop="uvloop",
        http=ServerProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=log_level,
        access_log=False,
        proxy_headers=False,  # nothing looks at who the client is
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        ssl_certfile=tls[0] if tls else None,
        ssl_keyfile=tls[1] if tls else None,
    )
    try:
        Server(config).run(sockets=[listener])
    finally:
        in_flight.close()
        notifier.close()
