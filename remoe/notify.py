"""What a replica tells the runtime about itself: sd_notify datagrams to NOTIFY_SOCKET.

The part of Knative's queue-proxy that matters locally: readiness, draining, and how many requests
are in flight. Without NOTIFY_SOCKET (on a cluster, or by hand) nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BUSY_S", "IN_FLIGHT", "REQUESTS", "InFlight", "Notifier"]

# Requests in flight now; requests started so far; request-seconds so far (the integral of requests
# in flight over time, whose slope is the mean concurrency: a lost report loses nothing).
IN_FLIGHT = "X_REMOE_IN_FLIGHT"
REQUESTS = "X_REMOE_REQUESTS"
BUSY_S = "X_REMOE_BUSY_S"

_INTERVAL_VARIABLE = "REMOE_NOTIFY_INTERVAL_S"


class Notifier:
    """Sends a replica's state; safe from any thread, and never blocks or fails its caller."""

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        self._ready_at: float | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            # A leading @ means the abstract name space, as in systemd.
            path = "\0" + address[1:] if address.startswith("@") else address
            with contextlib.suppress(OSError):
                self._socket.connect(path)

    @classmethod
    def from_environment(cls) -> Notifier:
        return cls(os.environ.get("NOTIFY_SOCKET"))

    def send(self, **fields: str) -> None:
        """Send `NAME=value` lines as one datagram; a dead or full supervisor loses it silently."""
        if self._socket is None:
            return
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        # The lifeline, not this, is what notices that the supervisor is gone.
        with contextlib.suppress(OSError):
            self._socket.send(message.encode())

    def status(self, text: str) -> None:
        """Say in a few words what a starting replica is doing; `remoe status` shows it."""
        self.send(STATUS=text)

    def ready(self) -> None:
        """Say that requests are being accepted from now on."""
        self._ready_at = time.monotonic()
        self.send(READY="1")

    def stopping(self) -> None:
        """Say that no more requests will be accepted."""
        self.send(STOPPING="1")

    @property
    def ready_for_s(self) -> float:
        """Seconds since `ready()`; 0 before it."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class InFlight:
    """Counts requests in flight, and reports them and their time once per interval.

    A daemon thread reports while there is anything to report: at once when the first request
    arrives, then every interval, and a last time when none is left. An idle replica is silent.
    The interval is REMOE_NOTIFY_INTERVAL_S, or 1 s as in Knative.
    """

    def __init__(self, notifier: Notifier, *, interval_s: float | None = None) -> None:
        self._notifier = notifier
        self._interval_s = (
            float(os.environ.get(_INTERVAL_VARIABLE, "1")) if interval_s is None else interval_s
        )
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._now = 0
        self._total = 0
        self._busy_s = 0.0
        self._changed_at = time.monotonic()
        self._thread = threading.Thread(target=self._report_loop, name="in-flight", daemon=True)
        self._thread.start()

    @property
    def now(self) -> int:
        """Requests in flight."""
        return self._now

    @property
    def total(self) -> int:
        """Requests started since the process began."""
        return self._total

    def enter(self) -> None:
        with self._lock:
            self._integrate()
            self._now += 1
            self._total += 1
        if not self._wake.is_set():
            self._wake.set()

    def leave(self) -> None:
        with self._lock:
            self._integrate()
            self._now -= 1

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request from here to the end of the block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def close(self) -> None:
        """Send what is left to report and end the thread."""
        self._closed.set()
        self._wake.set()
        self._thread.join()
        self._report()

    def _integrate(self) -> None:
        now = time.monotonic()
        self._busy_s += self._now * (now - self._changed_at)
        self._changed_at = now

    def _report(self) -> int:
        with self._lock:
            self._integrate()
            in_flight, total, busy_s = self._now, self._total, self._busy_s
        self._notifier.send(
            **{IN_FLIGHT: str(in_flight), REQUESTS: str(total), BUSY_S: f"{busy_s:.6f}"}
        )
        return in_flight

    def _report_loop(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._report()
            busy = True
            while busy and not self._closed.wait(self._interval_s):
                # A request after this line sets it again, and so keeps the loop going.
                self._wake.clear()
                busy = self._report() > 0 or self._wake.is_set()
