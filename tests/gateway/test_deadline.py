"""How long a client waits: read from its request, enforced here, and passed on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.deadline import timeout_s
from remoe.generation import GenerateEvent, GenerateRequest
from tests.gateway.conftest import Stack
from tests.gateway.tiny_text import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


def endless(stack: Stack) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        await asyncio.Event().wait()

    stack.main.script = script


def test_the_main_function_learns_of_the_deadline(stack: Stack, client: openai.OpenAI) -> None:
    # Both libraries send their own timeout along; here 20 s.
    client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert 15 < (stack.main.requests[-1].deadline_s or 0) < 20
    client.chat.completions.create(**CHAT, extra_headers={"x-remoe-timeout-s": "7.5"})  # type: ignore[call-overload]
    assert 5 < (stack.main.requests[-1].deadline_s or 0) < 7.5
    # In a stream each heartbeat satisfies it.
    list(client.chat.completions.create(**CHAT, stream=True))  # type: ignore[call-overload]
    assert [request.deadline_s for request in stack.main.requests][-1:] == [None]


def test_a_missed_deadline_cancels_and_is_not_to_be_retried(
    stack: Stack, http: httpx.Client
) -> None:
    endless(stack)
    reply = http.post("/v1/chat/completions", json=CHAT, headers={"x-remoe-timeout-s": "0.3"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert reply.headers["x-should-retry"] == "false"
    stack.main.cancelled.wait()


def test_a_missed_deadline_in_a_stream_is_its_last_event(stack: Stack, http: httpx.Client) -> None:
    endless(stack)
    reply = http.post(
        "/v1/chat/completions",
        json={**CHAT, "stream": True},
        headers={"x-remoe-timeout-s": "0.3"},
    )
    assert reply.status_code == 200
    assert "Paris" in reply.text
    assert '"code":"deadline_exceeded"' in reply.text.split("\n\n")[-2]
    stack.main.cancelled.wait()


@pytest.mark.parametrize("how", ["before", "after"])
def test_whoever_sees_the_deadline_first_says_the_same(
    stack: Stack, http: httpx.Client, how: str
) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        if how == "after":
            await asyncio.Event().wait()
        yield GenerateEvent(finish="error", error="the deadline has passed")

    stack.main.script = script
    headers = {"x-remoe-timeout-s": "0.05"}
    reply = http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    stack.main.arrived.wait()  # on a busy machine after the reply, and then in the next test


@pytest.mark.parametrize("value", ["", "soon", "-1", "0", "nan", "inf"])
def test_a_deadline_must_be_a_time(stack: Stack, http: httpx.Client, value: str) -> None:
    reply = http.post("/v1/chat/completions", json=CHAT, headers={"x-remoe-timeout-s": value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "x-remoe-timeout-s")
    assert stack.main.requests == []


@given(st.text(alphabet="0123456789.-+einfaNone ", max_size=8), st.booleans())
def test_a_library_s_own_header_is_never_an_error(value: str, stream: bool) -> None:
    for name in ("x-stainless-read-timeout", "x-stainless-timeout"):
        found = timeout_s({name: value}, stream=stream)
        assert found is None or (found > 0 and not stream)
