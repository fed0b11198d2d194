from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from main_model_fn.metering import Span, StepMeter
from main_model_fn.transport import RemoteResult

steps = st.lists(
    st.tuples(
        st.lists(st.integers(1, 5), min_size=1, max_size=4),  # rows of each request
        st.floats(0.001, 2.0),  # seconds the step took
        st.floats(0.0, 1.0),  # seconds its remote call was busy
    ),
    min_size=1,
    max_size=6,
)


@given(steps=steps, seed=st.integers(0, 1000))
def test_requests_together_are_billed_what_was_used(
    steps: list[tuple[list[int], float, float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    meter = StepMeter(layers=2, experts=4, main_memory_gb=3.0)
    requests = [meter.open() for _ in range(4)]
    now, routes = 0.0, 0
    for rows, seconds, busy_s in steps:
        spans = [
            Span(requests[n], count, prefill=count if n == 0 else 0) for n, count in enumerate(rows)
        ]
        meter.begin_step(spans, now)
        meter.record_routes(1, rng.integers(0, 4, (sum(rows), 2)))
        routes += 2 * sum(rows)
        result = RemoteResult(b"", busy_s, cold_start_s=0.0, retries=0, hedges=0, bytes_moved=1000)
        meter.record_call(np.arange(sum(rows)), result, memory_gb=0.5)
        now += seconds
        meter.end_step(now)
    ledgers = [request.ledger for request in requests]
    assert sum(ledger.main_cpu_gb_s for ledger in ledgers) == pytest.approx(3.0 * now)
    assert sum(ledger.remote_gb_s for ledger in ledgers) == pytest.approx(
        0.5 * sum(busy for _, _, busy in steps)
    )
    counted = sum(int(r.prefill_counts.sum() + r.decode_counts.sum()) for r in requests)
    assert counted == routes
    assert all(int(request.prefill_counts.sum()) == 0 for request in requests[1:])


def test_everyone_in_the_step_waits_for_a_cold_start_whoever_caused_it() -> None:
    meter = StepMeter(layers=1, experts=2, main_memory_gb=1.0, gpu_memory_gb=0.75)
    first, second, third = meter.open(), meter.open(), meter.open()
    meter.begin_step([Span(first, 2), Span(second, 1)], 0.0)
    result = RemoteResult(b"", 0.1, cold_start_s=0.4, retries=1, hedges=1, bytes_moved=30)
    meter.record_call(np.array([0, 2]), result, memory_gb=1.0)
    meter.end_step(1.0)
    assert first.ledger.remote_cold_start_s == second.ledger.remote_cold_start_s == 0.4
    assert (first.ledger.remote_rows, second.ledger.remote_rows) == (1, 1)
    assert (first.ledger.remote_retries, second.ledger.remote_hedges) == (1, 1)
    assert (first.ledger.main_gpu_gb_s, first.ledger.main_cpu_gb_s) == (0.375, 0.125)
    assert third.ledger.remote_calls == 0


def test_rows_computed_again_are_billed_and_not_counted() -> None:
    meter = StepMeter(layers=1, experts=8, main_memory_gb=1.0)
    request, other = meter.open(), meter.open()
    meter.begin_step([Span(other, 1), Span(request, 4, repeated=1, prefill=2)], 0.0)
    meter.record_routes(0, np.array([[7], [0], [1], [2], [3]]))
    meter.end_step(1.0)
    assert request.prefill_counts.tolist() == [[0, 1, 1, 0, 0, 0, 0, 0]]
    assert request.decode_counts.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]
    assert other.decode_counts.tolist() == [[0, 0, 0, 0, 0, 0, 0, 1]]
    assert request.ledger.main_cpu_gb_s == other.ledger.main_cpu_gb_s == 0.5


def test_a_step_may_take_as_long_as_its_most_patient_request_waits() -> None:
    meter = StepMeter(layers=1, experts=2, main_memory_gb=1.0)
    assert meter.remaining_s(0.0) is None  # nothing is under way
    soon, later, whenever = meter.open(10.0), meter.open(30.0), meter.open()
    meter.begin_step([Span(soon, 1), Span(later, 1)], 0.0)
    assert meter.remaining_s(12.0) == 18.0
    meter.begin_step([Span(soon, 1)], 0.0)
    assert meter.remaining_s(12.0) == -2.0
    meter.begin_step([Span(soon, 1), Span(whenever, 1)], 0.0)
    assert meter.remaining_s(12.0) is None
