from __future__ import annotations

import re
import time

from hypothesis import given
from hypothesis import strategies as st

from planner.identifiers import PlanIds
from tests.planner.worlds import ToldClock


@given(moves=st.lists(st.floats(-5, 5), max_size=50))
def test_identifiers_sort_as_made_whatever_the_clock_does(moves: list[float]) -> None:
    clock = ToldClock()
    ids = PlanIds(clock)
    made = []
    for move in moves:
        clock.now += move
        made.append(ids.make("plan"))
    assert made == sorted(set(made))


def test_identifiers_are_short_and_name_their_kind() -> None:
    assert re.fullmatch(r"epoch-[0-9a-z]{9}-[0-9a-z]{4}", PlanIds(time).make("epoch"))


def test_two_planners_in_the_same_millisecond_differ() -> None:
    clock = ToldClock()
    # 20 random bits each: all 20 equal by chance once in 2^380.
    assert len({PlanIds(clock).make("plan") for _ in range(20)}) > 1
