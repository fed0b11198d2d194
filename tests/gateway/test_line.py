"""The bounded line in front of the main function, and what those are told who wait or are sent off."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.line import Line
from gateway.progress import Progress
from gateway.timings import Timings
from remoe.errors import QueueFullError, UnavailableError
from tests.gateway.conftest import Stack, eventually
from tests.gateway.fakes import Gate
from tests.gateway.tiny_text import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_full_line_says_when_half_of_it_will_be_gone() -> None:
    timings, clock = Timings(), Clock()
    line = Line(2, timings, clock=clock)
    with line.place(2):
        with pytest.raises(QueueFullError) as caught, line.place(1):
            pass
        # Nothing was measured yet.
        assert caught.value.retry_after_s == 2
        for seconds in (3.0, 9.0, 4.0):
            timings.served(seconds)
        with pytest.raises(QueueFullError) as caught, line.place(1):
            pass
        assert caught.value.retry_after_s == 4.0
    with line.place(1):
        pass


def test_while_the_model_starts_what_is_left_of_that_is_added() -> None:
    timings, clock = Timings(), Clock()
    line = Line(1, timings, clock=clock)
    timings.served(4.0)
    timings.started(8.0)
    with line.place(1), line.start():
        # A running main function answers at once, so this is not known to be a start yet.
        with pytest.raises(QueueFullError), line.place(1):
            pass
        clock.now += 5
        assert line.cold
        with pytest.raises(UnavailableError) as caught, line.place(1):
            pass
        assert caught.value.retry_after_s == pytest.approx(4 + 8 - 5)
        clock.now += 600
        assert line.retry_after_s() == 4.0
    assert not line.cold


@given(
    services=st.lists(st.floats(0, 1e6), max_size=40),
    starts=st.lists(st.floats(0, 1e6), max_size=40),
    waited=st.floats(0, 1e4),
)
def test_no_client_is_told_to_give_up(
    services: list[float], starts: list[float], waited: float
) -> None:
    timings, clock = Timings(), Clock()
    for seconds in services:
        timings.served(seconds)
    for seconds in starts:
        timings.started(seconds)
    line = Line(1, timings, clock=clock)
    with line.start():
        clock.now += waited
        # OpenAI's clients give up above 120 s.
        assert 1 <= line.retry_after_s() <= 60


def test_a_large_request_alone_is_let_in() -> None:
    line = Line(2, Timings())
    with line.place(5), pytest.raises(QueueFullError), line.place(1):
        pass


def test_a_full_gateway_refuses_at_once(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    stack.main.before_headers = gate = Gate()
    url = serve_gateway(max_open=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=CHAT, timeout=20)
        stack.main.arrived.wait()
        for stream in (False, True):
            body = {**CHAT, "stream": stream}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
            assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == ("2", "true")

        def starting() -> bool:
            return bool(httpx.get(f"{url}/v1/models").json()["data"][0]["state"] == "starting")

        eventually(starting)
        reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_loading")
        gate.open()
        assert first.result(20).status_code == 200
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200


def test_progress_goes_forward_and_says_what_was_measured() -> None:
    timings, clock = Timings(), Clock()
    progress = Progress(timings, clock)
    assert progress.comment() == "remoe phase=planning waited_s=0.0"
    progress.enter("starting")
    clock.now += 2
    assert progress.comment() == "remoe phase=starting waited_s=2.0"
    timings.started(7.94)
    assert progress.comment() == "remoe phase=starting waited_s=2.0 expected_s=7.9"
    progress.enter("reading")
    progress.enter("starting")
    timings.first_token(1.25)
    assert progress.comment() == "remoe phase=reading waited_s=0.0 expected_s=1.2"
    progress.enter("answering")
    clock.now += 1
    assert progress.comment() == "remoe phase=answering waited_s=1.0"
