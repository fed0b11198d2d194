from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.prefill_time import PrefillTime


def learned(*samples: tuple[int, float], adaptation: float = 0.1) -> PrefillTime:
    time = PrefillTime(adaptation)
    for tokens, seconds in samples:
        time.add(tokens, seconds)
    return time


def test_nothing_is_known_before_the_first_request() -> None:
    assert learned().line is None


def test_one_length_gives_all_time_to_the_tokens() -> None:
    line = learned((20, 0.5), (20, 0.5)).line
    assert line is not None
    np.testing.assert_allclose(line, (0.0, 0.025))


@given(
    st.floats(0.001, 1),
    st.floats(1e-5, 0.1),
    st.lists(st.integers(1, 4096), min_size=2, max_size=40, unique=True),
)
def test_a_line_is_found_again(fixed_s: float, s_per_token: float, lengths: list[int]) -> None:
    found = learned(*((n, fixed_s + s_per_token * n) for n in lengths), adaptation=0.3).line
    assert found is not None
    at = np.array(lengths)
    if np.ptp(at) > 0.5 * at.max():
        np.testing.assert_allclose(found[0] + found[1] * at, fixed_s + s_per_token * at, rtol=1e-3)


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(1e-4, 100)), min_size=1, max_size=30))
def test_no_time_is_below_zero(samples: list[tuple[int, float]]) -> None:
    found = learned(*samples).line
    assert found is not None
    assert min(found) >= 0
    assert max(found) > 0


def test_a_short_first_prompt_does_not_make_long_ones_take_minutes() -> None:
    # One token in a quarter of a second, then two prompts as they are usual.
    line = learned((1, 0.25), (148, 0.26), (120, 0.24)).line
    assert line is not None
    assert 0.25 < line[0] + 148 * line[1] < 0.27
