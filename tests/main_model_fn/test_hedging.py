from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from main_model_fn.hedging import HedgeDelay


def test_nothing_is_late_before_enough_is_known() -> None:
    delay = HedgeDelay(floor_s=0.001)
    for _ in range(15):
        delay.record(8, 0.01)
        assert delay.seconds(8) is None
    delay.record(8, 0.01)
    assert delay.seconds(8) == pytest.approx(0.03)
    assert delay.seconds(7) is None  # smaller calls may be much faster


def test_larger_calls_may_take_longer_in_proportion() -> None:
    delay = HedgeDelay(floor_s=0.001)
    for _ in range(16):
        delay.record(2, 0.01)
    assert delay.seconds(64) == pytest.approx(0.03 * 32)
    for _ in range(16):
        delay.record(100, 0.02)
    assert delay.seconds(64) == pytest.approx(0.06)


def test_a_function_that_became_slow_is_judged_by_what_it_is_now() -> None:
    delay = HedgeDelay(floor_s=0.001)
    for _ in range(64):
        delay.record(1, 0.001)
    for _ in range(64):
        delay.record(1, 0.5)
    assert delay.seconds(1) == pytest.approx(1.5)


def test_hedges_are_earned_by_calls_that_need_none() -> None:
    delay = HedgeDelay(floor_s=0.001)
    for _ in range(16):
        delay.record(1, 0.01)
    delay.spend()
    for _ in range(33):
        assert delay.seconds(1) is None
        delay.record(1, 0.01)
    delay.record(1, 0.01)
    assert delay.seconds(1) is not None
    for _ in range(1000):
        delay.record(1, 0.01)
    for _ in range(3):
        assert delay.seconds(1) is not None
        delay.spend()
    assert delay.seconds(1) is None


@given(
    latencies_s=st.lists(st.floats(1e-5, 1.0), min_size=16, max_size=200),
    floor_s=st.floats(0.001, 0.1),
)
def test_few_of_the_calls_it_knows_would_have_been_hedged(
    latencies_s: list[float], floor_s: float
) -> None:
    delay = HedgeDelay(floor_s=floor_s)
    for latency_s in latencies_s:
        delay.record(1, latency_s)
    late_s = delay.seconds(1)
    assert late_s is not None
    assert late_s >= floor_s
    known = latencies_s[: len(latencies_s) // 16 * 16][-64:]
    assert sum(latency_s > late_s for latency_s in known) <= 0.05 * len(known) + 1
