"""What requests teach the model of times."""

from __future__ import annotations

import pytest

from planner.calibration import Calibration


def test_a_cold_requests_first_token_teaches_nothing() -> None:
    calibration = Calibration(0.1)
    calibration.predicted("cold", 1.0, 0.1)
    calibration.observed("cold", None, 0.2)
    assert calibration.drift.prefill_factor == 1
    assert calibration.drift.decode_factor == pytest.approx(2)
