"""Log-probabilities: their place beside the text, their bytes, and what stop strings hide."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.choice import Choice, TokenPiece
from gateway.detokenizer import Detokenizer
from remoe.generation import GenerateEvent
from tests.gateway.conftest import Stack
from tests.gateway.fakes import scored
from tests.gateway.tiny_text import MODEL

TEXT = "né 漢字 ok"


def test_chat_logprobs_have_bytes_of_split_characters(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say(TEXT)
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "x"}],
        logprobs=True,
        top_logprobs=2,
    )
    (choice,) = reply.choices
    assert choice.message.content == TEXT
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    tokens = stack.encode(TEXT)
    assert [entry.logprob for entry in content] == [-token / 100 for token in tokens]
    # The tokenizer's alphabet is bytes: 漢 is three tokens, each shown by its byte.
    assert b"".join(bytes(entry.bytes or []) for entry in content) == TEXT.encode()
    assert "\\xe6" in [entry.token for entry in content]
    assert all([top.logprob for top in entry.top_logprobs] == [0, -0.01] for entry in content)
    assert bytes(content[0].top_logprobs[0].bytes or []) == b"<|endoftext|>"


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_streamed_logprobs_are_those_of_the_whole(
    stack: Stack, http: httpx.Client, endpoint: str
) -> None:
    stack.main.say(TEXT, per_event=2)
    chat = endpoint.startswith("/v1/chat")
    body: dict[str, object] = (
        {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
        if chat
        else {"prompt": "The", "echo": True, "logprobs": 1}
    )
    body["model"] = MODEL
    whole = http.post(endpoint, json=body).json()["choices"][0]["logprobs"]
    reply = http.post(endpoint, json={**body, "stream": True})
    parts = [
        choice["logprobs"]
        for line in reply.text.split("\n\n")
        if line.startswith("data: {")
        for choice in json.loads(line.removeprefix("data: "))["choices"]
        if choice["logprobs"]
    ]
    for name in whole:
        if whole[name] is not None:
            assert [entry for part in parts for entry in part[name]] == whole[name]


def test_completion_logprobs_are_parallel_arrays(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say(TEXT)
    reply = client.completions.create(model=MODEL, prompt="The né", echo=True, logprobs=2)
    (choice,) = reply.choices
    logprobs = choice.logprobs
    assert choice.text == "The né" + TEXT
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    tokens = [*stack.encode("The né"), *stack.encode(TEXT)]
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(tokens)
    assert logprobs.token_logprobs == [None, *(-token / 100 for token in tokens[1:])]
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    # The chosen token is listed beside the two likeliest.
    assert [len(top) for top in logprobs.top_logprobs[1:]] == [3] * (len(tokens) - 1)


def test_logprobs_0_is_the_chosen_token_alone(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say("Paris")
    reply = client.completions.create(model=MODEL, prompt="x", logprobs=0)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert stack.main.requests[0].logprobs == 0
    assert logprobs.tokens is not None
    assert [list(top) for top in logprobs.top_logprobs or [] if top] == [
        [token] for token in logprobs.tokens
    ]
    plain = client.completions.create(model=MODEL, prompt="x")
    assert plain.choices[0].logprobs is None


@given(data=st.data())
def test_logprobs_never_run_ahead_of_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="abP漢é😀 .", min_size=1, max_size=20))
    stops = tuple(
        data.draw(st.lists(st.text(alphabet="abP漢é", min_size=1, max_size=3), max_size=4))
    )
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    choice = Choice(Detokenizer(tokenizer), stops)
    shown, pieces = "", list[TokenPiece]()
    rest = tokens
    while choice.finish is None:
        size = data.draw(st.integers(1, 4))
        now, rest = rest[:size], rest[size:]
        step = choice.absorb(
            [
                GenerateEvent(
                    tokens=now,
                    logprobs=[scored(token, 0) for token in now],
                    finish=None if rest else "stop",
                )
            ],
            now=1.0,
        )
        shown += step.text
        pieces += step.pieces
        # What a stop string may still swallow has shown neither its text nor its tokens.
        if choice.finish is None:
            assert all(piece.offset < len(shown) for piece in pieces)
    expected = text
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if ends:
        expected = text[: min(ends)[1]]
    assert shown == expected
    assert [piece.token for piece in pieces] == tokens[: len(pieces)]
    if not ends:
        assert len(pieces) == len(tokens)


def test_many_streams_at_once_keep_their_own(stack: Stack) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> bool:
        prompt = f"Hello {number} world" * (1 + number % 3)
        reply = await client.completions.create(model=MODEL, prompt=prompt, logprobs=0)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        return (
            "".join(logprobs.tokens or [])
            == reply.choices[0].text
            == prompt[: len(reply.choices[0].text)]
        )

    async def run() -> list[bool]:
        async with openai.AsyncOpenAI(
            base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=20
        ) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(16)))

    assert all(asyncio.run(run()))
