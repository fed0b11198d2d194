from __future__ import annotations

import pytest

from planner.moving_mean import MovingMean


def mean_of(*samples: float | None, adaptation: float) -> float | None:
    mean = MovingMean(adaptation)
    for sample in samples:
        mean.add(sample)
    return mean.value


def test_nothing_is_known_before_the_first_sample() -> None:
    assert mean_of(adaptation=0.1) is None
    assert mean_of(None, adaptation=0.1) is None


def test_it_begins_as_a_plain_mean() -> None:
    assert mean_of(9.0, None, 1.0, 2.0, adaptation=0.1) == pytest.approx(4.0)


def test_then_the_newest_weighs_the_adaptation() -> None:
    assert mean_of(1.0, 1.0, 1.0, 5.0, adaptation=0.5) == pytest.approx(3.0)


def test_an_odd_first_request_is_soon_forgotten() -> None:
    # With the weight that it had as the only one it would be 1.49 still.
    assert mean_of(5.0, *[1.0] * 20, adaptation=0.1) == pytest.approx(1.13, abs=0.01)
