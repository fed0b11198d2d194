"""When a function that fails is tried again, and when its callers are refused."""

from __future__ import annotations

import pytest

from knative.local.backoff import Backoff
from knative.local.options import RuntimeOptions

OPTIONS = RuntimeOptions(backoff_first_s=1, backoff_most_s=5, failures_until_refusal=3)


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_failures_to_start_wait_ever_longer_up_to_a_limit() -> None:
    clock = Time()
    backoff = Backoff(OPTIONS, clock)
    waits = []
    for _ in range(5):
        backoff.failed("exited", ready_at=None)
        waits.append(backoff.remaining_s)
        clock.now += backoff.remaining_s
        assert not backoff.waiting
    assert waits == [1, 2, 4, 5, 5]


def test_callers_are_refused_from_the_third_failure_until_one_works() -> None:
    backoff = Backoff(OPTIONS, Time())
    refusing = []
    for _ in range(3):
        backoff.failed("exited", ready_at=None)
        refusing.append(backoff.refusing)
    assert refusing == [False, False, True]
    backoff.worked()
    assert not backoff.refusing


def test_a_crash_of_a_working_replica_costs_no_wait_the_first_time() -> None:
    clock = Time()
    backoff = Backoff(OPTIONS, clock)
    backoff.failed("killed", ready_at=clock.now - 1)
    assert not backoff.waiting
    backoff.failed("killed", ready_at=clock.now - 1)
    assert backoff.remaining_s == pytest.approx(1)


def test_a_replica_that_lived_long_begins_a_new_row_of_failures() -> None:
    clock = Time()
    backoff = Backoff(OPTIONS, clock)
    for _ in range(4):
        backoff.failed("exited", ready_at=None)
    clock.now += 60
    backoff.worked()
    backoff.failed("killed", ready_at=clock.now - OPTIONS.stable_after_s)
    assert (backoff.failures, backoff.waiting, backoff.refusing) == (1, False, False)
