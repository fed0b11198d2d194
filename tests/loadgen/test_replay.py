"""The replay under a clock that jumps: nothing here takes real time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.record import RequestRecord, Status
from loadgen.replay import Replay, ReplayLimits
from loadgen.workload import PlannedRequest
from tests.loadgen.clocks import JumpingClock


class TimedSender:
    """Answers after a time of its own, and knows who was there together."""

    def __init__(
        self, clock: JumpingClock, zero: float, takes_s: Callable[[int], float] = lambda _: 0.1
    ) -> None:
        self.clock, self.zero, self.takes_s = clock, zero, takes_s
        self.status: Callable[[int], Status] = lambda _: "completed"
        self.in_flight = self.most_in_flight = 0
        self.sent: dict[int, float] = {}

    async def send(self, record: RequestRecord, body: bytes) -> None:
        record.sent_s = self.sent[record.index] = self.clock.now() - self.zero
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.clock.sleep(self.takes_s(record.index))
            record.status = self.status(record.index)
        finally:
            self.in_flight -= 1
            record.last_s = self.clock.now() - self.zero


class Rig:
    def __init__(
        self,
        *,
        takes_s: Callable[[int], float] = lambda _: 0.1,
        limits: ReplayLimits | None = None,
        making_s: float = 0.0,
    ) -> None:
        self.clock = JumpingClock()
        zero = self.clock.now() + 1.0
        self.sender = TimedSender(self.clock, zero, takes_s)
        self.done: list[RequestRecord] = []

        def body_of(request: PlannedRequest, record: RequestRecord) -> bytes:
            self.clock.spend(making_s)
            return b"{}"

        self.replay = Replay(
            self.sender,
            clock=self.clock,
            zero=zero,
            limits=limits or ReplayLimits(),
            body_of=body_of,
            on_done=self.done.append,
            planned=0,
        )

    def open(self, *times_s: float) -> None:
        self.clock.run(self.replay.open_loop(planned(times_s)))

    def status_of(self, index: int) -> str:
        return next(record.status for record in self.done if record.index == index)


def planned(times_s: tuple[float, ...]) -> list[PlannedRequest]:
    return [PlannedRequest(i, at, 1, 1) for i, at in enumerate(times_s)]


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 10), min_size=1, max_size=20),
    takes_s=st.floats(0.001, 100),
)
def test_every_request_is_sent_at_its_own_moment(gaps: list[float], takes_s: float) -> None:
    times = []
    at = 0.0
    for gap in gaps:
        at += gap
        times.append(at)
    rig = Rig(takes_s=lambda _: takes_s, limits=ReplayLimits(drain_s=1000))
    rig.open(*times)
    assert [rig.sender.sent[i] for i in range(len(times))] == pytest.approx(times, abs=1e-9)
    assert sorted(record.index for record in rig.done) == list(range(len(times)))
    assert all(record.status == "completed" for record in rig.done)


def test_being_late_once_delays_nobody_after() -> None:
    """Deadlines are absolute: with sleeps from one to the next, all would be 0.75 s late."""
    rig = Rig(making_s=0.25)
    rig.open(0.0, 0.1, 0.2, 2.0, 3.0)
    assert [rig.sender.sent[i] for i in range(5)] == pytest.approx([0.0, 0.25, 0.5, 2.0, 3.0])
    assert [round(record.lag_s or 0, 6) for record in rig.done] == [0, 0.15, 0.3, 0, 0]


def test_the_guard_skips_and_says_so() -> None:
    rig = Rig(takes_s=lambda _: 10.0, limits=ReplayLimits(max_in_flight=2))
    rig.open(0, 1, 2, 3, 11)
    assert [rig.status_of(i) for i in range(5)] == [
        "completed",
        "completed",
        "skipped",
        "skipped",
        "completed",
    ]
    assert rig.replay.progress.skipped == 2
    assert rig.sender.most_in_flight == 2


def test_draining_has_an_end() -> None:
    rig = Rig(takes_s=lambda index: 5.0 if index else 500.0, limits=ReplayLimits(drain_s=20))
    rig.open(0, 1)
    assert (rig.status_of(0), rig.status_of(1)) == ("cancelled", "completed")
    assert rig.clock.now() < 1000 + 30
    assert rig.replay.progress.stopped is None


def test_a_count_of_errors_stops_the_run() -> None:
    rig = Rig(limits=ReplayLimits(max_errors=3))
    rig.sender.status = lambda _: "failed"
    rig.open(*range(10))
    assert rig.replay.progress.stopped == "3 requests failed (--max-errors 3)"
    assert len(rig.sender.sent) == 3


def test_a_share_of_errors_stops_the_run() -> None:
    rig = Rig(limits=ReplayLimits(max_error_share=0.5))
    rig.sender.status = lambda index: "completed" if index < 10 else "incomplete"
    rig.open(*range(100))
    # 10 good ones, then bad ones: 11 of 21 are the first to be more than half.
    assert len(rig.sender.sent) == 21
    assert "52% of the last 21 requests failed" in (rig.replay.progress.stopped or "")


def test_stopping_cancels_what_is_in_flight() -> None:
    rig = Rig(takes_s=lambda _: 100.0)

    async def scenario() -> None:
        import asyncio

        task = asyncio.ensure_future(rig.replay.open_loop(planned((0.0, 1.0, 50.0))))
        await rig.clock.sleep(10)
        rig.replay.stop("by you")
        await task

    rig.clock.run(scenario())
    assert [record.status for record in rig.done] == ["cancelled", "cancelled"]
    assert rig.replay.progress.stopped == "by you"
    assert rig.clock.now() < 1015


@settings(max_examples=20, deadline=None)
@given(
    concurrency=st.integers(1, 6),
    takes=st.lists(st.floats(0.01, 5), min_size=1, max_size=20),
)
def test_a_closed_loop_keeps_its_number_in_flight(concurrency: int, takes: list[float]) -> None:
    rig = Rig(takes_s=lambda index: takes[index], limits=ReplayLimits(drain_s=1000))
    requests = [PlannedRequest(i, None, 1, 1) for i in range(len(takes))]
    rig.clock.run(rig.replay.closed_loop(requests, concurrency=concurrency))
    assert rig.sender.most_in_flight == min(concurrency, len(takes))
    assert sorted(record.index for record in rig.done) == list(range(len(takes)))
    assert all(record.lag_s is None for record in rig.done)


def test_a_closed_loop_ends_with_its_time() -> None:
    rig = Rig(takes_s=lambda _: 1.0)
    requests = [PlannedRequest(i, None, 1, 1) for i in range(1000)]
    rig.clock.spend(1.0)
    rig.clock.run(rig.replay.closed_loop(requests, concurrency=2, until_s=5.0))
    assert len(rig.done) == 10


def test_a_fault_of_our_own_is_a_record_too() -> None:
    rig = Rig()

    def broken(_: int) -> Status:
        raise ValueError("a bug")

    rig.sender.status = broken
    rig.open(0.0)
    assert (rig.done[0].status, rig.done[0].error) == ("failed", "load generator")
    assert "a bug" in (rig.done[0].error_detail or "")
