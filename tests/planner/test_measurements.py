from __future__ import annotations

import msgspec
import pytest

from planner.measurements import FinishedRequest, Learner, Measurements
from remoe.ledger import Ledger

REQUEST = FinishedRequest(
    prompt_tokens=10,
    decode_tokens=4,
    ttft_s=0.5,
    tpot_s=0.1,
    main_memory_gb=2.0,
    remote_memory_gb=0.25,
    ledger=Ledger(main_cpu_gb_s=0.9, remote_gb_s=0.05, remote_calls=20),
)


def learned(*requests: FinishedRequest, adaptation: float = 0.5) -> Measurements:
    learner = Learner(adaptation)
    for request in requests:
        learner.observe(request)
    return learner.measured


def test_nothing_is_known_before_the_first_request() -> None:
    assert learned() == Measurements()


def test_the_first_request_is_taken_as_it_is() -> None:
    measured = learned(REQUEST)
    assert measured.prefill_s(10) == pytest.approx(0.5)
    assert measured.decode_s_per_token == pytest.approx(0.1)
    assert measured.remote_s_per_call == pytest.approx(0.05 / 20 / 0.25)
    # 2 GB for 0.5 + 4 * 0.1 s are 1.8 GB·s; half of them were billed.
    assert measured.main_cpu_share == pytest.approx(0.5)
    assert measured.main_gpu_share == 0
    assert (measured.decode_tokens, measured.requests) == (4, 1)


def test_times_move_by_the_adaptation_and_lengths_by_the_mean() -> None:
    slower = msgspec.structs.replace(REQUEST, ttft_s=1.5, tpot_s=0.3, decode_tokens=10)
    measured = learned(REQUEST, REQUEST, REQUEST, REQUEST, slower, adaptation=0.25)
    assert measured.prefill_s(10) == pytest.approx(0.5 + 0.25 * 1.0)
    assert measured.decode_s_per_token == pytest.approx(0.1 + 0.25 * 0.2)
    assert measured.decode_tokens == pytest.approx(5.2)


def test_a_cold_request_teaches_first_tokens_only_until_a_warm_one() -> None:
    cold = msgspec.structs.replace(REQUEST, ttft_s=30.0, cold=True)
    assert learned(cold).prefill_s(10) == pytest.approx(30)
    assert learned(cold, REQUEST).prefill_s(10) == pytest.approx(0.5)
    assert learned(cold, REQUEST, cold).prefill_s(10) == pytest.approx(0.5)


def test_what_a_request_does_not_show_stays_as_it_was() -> None:
    silent = msgspec.structs.replace(REQUEST, ttft_s=0.0, tpot_s=None, ledger=None)
    unbilled = msgspec.structs.replace(REQUEST, ledger=Ledger(), main_memory_gb=None)
    assert learned(REQUEST, silent, unbilled) == msgspec.structs.replace(
        learned(REQUEST), requests=3
    )
    assert learned(silent) == Measurements(decode_tokens=4, requests=1)
