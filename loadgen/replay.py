"""Sending on time: the open loop by absolute deadlines, the closed loop, and when to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from loadgen.clock import Clock
from loadgen.record import RequestRecord
from loadgen.workload import PlannedRequest

__all__ = ["Progress", "Replay", "ReplayLimits", "Sender"]


class Sender(Protocol):
    """Sends one request and fills its record; raises nothing but CancelledError."""

    async def send(self, record: RequestRecord, body: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """When not to send, and when to give up.

    max_in_flight: an arrival that finds so many requests in flight is skipped and counted, not
        sent late, which would turn an open loop into a closed one.
    drain_s: how long to wait for answers after the last arrival.
    max_errors: stop after so many failures. max_error_share: stop when more than this share of
        the last 50 finished requests has failed (at least 20 of them).
    """

    max_in_flight: int = 4096
    drain_s: float = 60.0
    max_errors: int | None = None
    max_error_share: float = 0.5


@dataclass(slots=True)
class Progress:
    """The run so far, for the live line. `planned` is None where time is the limit."""

    planned: int | None
    sent: int = 0
    in_flight: int = 0
    done: int = 0
    errors: int = 0
    skipped: int = 0
    lags_s: list[float] = field(default_factory=list)
    stopped: str | None = None


class Replay:
    """Runs planned requests through a sender, once."""

    def __init__(
        self,
        sender: Sender,
        *,
        clock: Clock,
        zero: float,
        limits: ReplayLimits,
        body_of: Callable[[PlannedRequest, RequestRecord], bytes],
        on_done: Callable[[RequestRecord], None],
        planned: int | None,
    ) -> None:
        """`body_of` makes a request's body and may note in its record what it made.

        `on_done` is called once for every request, in the order in which they end.
        """
        self.progress = Progress(planned)
        self._sender = sender
        self._clock = clock
        self._zero = zero
        self._limits = limits
        self._body_of = body_of
        self._on_done = on_done
        self._tasks: set[asyncio.Task[None]] = set()
        self._recent: list[bool] = []
        self._stop = asyncio.Event()

    def stop(self, reason: str) -> None:
        """Send nothing more and cancel what is in flight."""
        if not self._stop.is_set():
            self.progress.stopped = reason
            self._stop.set()

    async def open_loop(self, requests: Iterable[PlannedRequest]) -> None:
        """Send each request at its own moment, whatever became of the ones before.

        Deadlines are absolute, from the run's zero: a late request delays no other one.
        """
        for request in requests:
            record = _record_of(request)
            # Made before it is due: making a prompt must not make it late.
            body = self._body_of(request, record)
            if not await self._wait_until(self._zero + (request.intended_s or 0.0)):
                break
            if self.progress.in_flight >= self._limits.max_in_flight:
                record.status = "skipped"
                self.progress.skipped += 1
                self._on_done(record)
                continue
            self._start(record, body)
            await asyncio.sleep(0)  # let it be sent before the next prompt is made
        await self._drain()

    async def closed_loop(
        self, requests: Iterable[PlannedRequest], *, concurrency: int, until_s: float | None = None
    ) -> None:
        """Keep `concurrency` requests in flight: each answer sends the next."""
        waiting = iter(requests)

        async def worker() -> None:
            for request in waiting:
                if self._stop.is_set() or (until_s is not None and self._now_s() >= until_s):
                    return
                record = _record_of(request)
                body = self._body_of(request, record)
                await asyncio.wait([self._start(record, body)])

        workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
        await self._until_stopped(asyncio.gather(*workers))
        await self._drain()

    def _now_s(self) -> float:
        return self._clock.now() - self._zero

    def _start(self, record: RequestRecord, body: bytes) -> asyncio.Task[None]:
        self.progress.sent += 1
        self.progress.in_flight += 1
        # The record is there from the start, so that nothing sent can get lost.
        task = asyncio.create_task(self._sender.send(record, body))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, record))
        return task

    def _ended(self, task: asyncio.Task[None], record: RequestRecord) -> None:
        self._tasks.discard(task)
        self.progress.in_flight -= 1
        self.progress.done += 1
        if not task.cancelled():
            error = task.exception()
            if error is not None:
                record.status, record.error = "failed", "load generator"
                record.error_detail = repr(error)
        if record.lag_s is not None:
            self.progress.lags_s.append(record.lag_s)
        failed = record.status in {"failed", "incomplete"}
        self.progress.errors += failed
        if record.status != "cancelled":
            self._judge(failed)
        self._on_done(record)

    def _judge(self, failed: bool) -> None:
        self._recent = [*self._recent[-49:], failed]
        limits, errors = self._limits, self.progress.errors
        if limits.max_errors is not None and errors >= limits.max_errors:
            self.stop(f"{errors} requests failed (--max-errors {limits.max_errors})")
        elif len(self._recent) >= 20:
            share = sum(self._recent) / len(self._recent)
            if share > limits.max_error_share:
                self.stop(
                    f"{share:.0%} of the last {len(self._recent)} requests failed "
                    f"(--max-error-share {limits.max_error_share:g})"
                )

    async def _wait_until(self, moment: float) -> bool:
        """Return True at the moment, or False as soon as the run is stopped."""
        if self._stop.is_set():
            return False
        if self._clock.now() >= moment:
            await asyncio.sleep(0)  # even a late schedule lets answers in
            return not self._stop.is_set()
        sleeping = asyncio.ensure_future(self._clock.sleep_until(moment))
        await self._until_stopped(sleeping)
        return not self._stop.is_set()

    async def _until_stopped(self, work: asyncio.Future[Any]) -> None:
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([work, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not work.done():
                work.cancel()

    async def _drain(self) -> None:
        """Wait for what is in flight, then cancel the rest."""
        if self._tasks and not self._stop.is_set():
            moment = self._clock.now() + self._limits.drain_s
            everything = asyncio.gather(*self._tasks, return_exceptions=True)
            patience = asyncio.ensure_future(self._clock.sleep_until(moment))
            stopping = asyncio.create_task(self._stop.wait())
            waiting: list[asyncio.Future[Any]] = [everything, patience, stopping]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in (patience, stopping):
                task.cancel()
        for task in list(self._tasks):
            task.cancel()
        while self._tasks:
            await asyncio.wait(list(self._tasks))


def _record_of(request: PlannedRequest) -> RequestRecord:
    return RequestRecord(
        index=request.index,
        stage=request.stage,
        topic=request.topic,
        asked_prompt_tokens=request.prompt_tokens if request.prompt is None else None,
        asked_output_tokens=request.output_tokens,
        intended_s=request.intended_s,
    )
