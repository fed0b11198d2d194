"""One replica: a process, what it reports, and the memory it holds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Literal

import psutil

from knative.local.function_log import LogPipe
from knative.local.process import Process
from remoe.notify import BUSY_S, IN_FLIGHT, REQUESTS
from remoe.runtime_status import ReplicaState, ReplicaStatus

__all__ = ["Replica", "StartReason"]

StartReason = Literal["initial", "activation", "scale_out", "restart"]


class Replica:
    """Its state changes by what it reports and by what its function decides."""

    def __init__(self, name: str, reason: StartReason, process: Process, pipe: LogPipe) -> None:
        self.name = name
        self.reason = reason
        self.process = process
        self.pipe = pipe
        self.state: ReplicaState = "starting"
        # Why it was told to go, if it was; an exit without that is a crash.
        self.told_to_go = False
        self.memory_killed = False
        self.failed_to_start = False
        self.started_at = time.monotonic()
        self.ready_at: float | None = None
        self.detail = ""
        self.in_flight = 0
        self.requests = 0
        self.memory_bytes = 0
        self.mapped_bytes = 0
        self._busy_s = 0.0
        self._reported_at = self.started_at
        self._sampled_at = self.started_at
        self._sampled_busy_s = 0.0
        self._psutil: psutil.Process | None = None

    def take_report(self, fields: Mapping[str, str]) -> int:
        """Update from a datagram; returns how many new requests it tells of."""
        now = time.monotonic()
        if fields.get("READY") == "1" and self.state == "starting":
            self.state = "ready"
            self.ready_at = now
            self.detail = ""
        if fields.get("STOPPING") == "1":
            self.state = "draining"
        if "STATUS" in fields:
            self.detail = fields["STATUS"]
        if IN_FLIGHT not in fields:
            return 0
        with contextlib.suppress(KeyError, ValueError):
            in_flight, requests = int(fields[IN_FLIGHT]), int(fields[REQUESTS])
            self._busy_s = float(fields[BUSY_S])
            new = requests - self.requests
            self.in_flight, self.requests, self._reported_at = in_flight, requests, now
            return new
        return 0

    def take_mean_concurrency(self) -> float:
        """Mean requests in flight since the last call, carried on from the last report."""
        now = time.monotonic()
        busy_s = self._busy_s + self.in_flight * (now - self._reported_at)
        elapsed_s = now - self._sampled_at
        mean = (busy_s - self._sampled_busy_s) / elapsed_s if elapsed_s > 0 else 0.0
        self._sampled_at = now
        self._sampled_busy_s = max(busy_s, self._sampled_busy_s)
        return max(0.0, mean)

    def measure_memory(self) -> None:
        """Anonymous memory is resident less shared, and shared is what maps files."""
        with contextlib.suppress(psutil.Error):
            if self._psutil is None:
                self._psutil = psutil.Process(self.process.pid)
            memory = self._psutil.memory_info()
            self.memory_bytes = memory.rss - memory.shared
            self.mapped_bytes = memory.shared

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            name=self.name,
            pid=self.process.pid,
            state=self.state,
            age_s=time.monotonic() - self.started_at,
            in_flight=self.in_flight,
            memory_bytes=self.memory_bytes,
            mapped_bytes=self.mapped_bytes,
        )
