"""Stop strings end the text exactly where they begin, whatever the pieces are."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.stop import StopMatcher

# Few letters, so that stops occur, overlap, and nearly occur.
letters = st.text(alphabet="ab\n", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(tuple(stops))
    shown = []
    for piece in pieces:
        step = matcher.push(piece)
        shown.append(step.text)
        if step.stopped:
            return shown, True
    return [*shown, matcher.flush()], False


def up_to_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The oracle, letter by letter: stop at the first letter that completes any stop string."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def cut(text: str, borders: list[int]) -> list[str]:
    places = [0, *sorted(border % (len(text) + 1) for border in borders), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


@settings(max_examples=1000)
@given(text=letters, stops=stop_lists, borders=st.lists(st.integers(0, 1000), max_size=12))
@example(text="ab", stops=["ab", "b"], borders=[1])
@example(text="aab", stops=["ab"], borders=[1, 2])
def test_output_is_the_text_up_to_the_first_stop(
    text: str, stops: list[str], borders: list[int]
) -> None:
    shown, stopped = run(cut(text, borders), stops)
    assert ("".join(shown), stopped) == up_to_first_stop(text, stops)


@settings(max_examples=500)
@given(text=letters, stops=stop_lists, borders=st.lists(st.integers(0, 1000), max_size=12))
def test_nothing_shown_is_taken_back(text: str, stops: list[str], borders: list[int]) -> None:
    expected, _ = up_to_first_stop(text, stops)
    shown, _ = run(cut(text, borders), stops)
    for count in range(len(shown) + 1):
        assert expected.startswith("".join(shown[:count]))


@given(text=letters)
def test_without_stops_text_passes_at_once(text: str) -> None:
    assert StopMatcher(()).push(text).text == text


def test_text_that_cannot_become_a_stop_is_not_held() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.push("the E").text == "the "
    assert matcher.push("nd").text == "End"
