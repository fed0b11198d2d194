"""Text completions through the openai client."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from tests.gateway.conftest import Stack
from tests.gateway.tiny_text import CONTEXT, MODEL


def test_an_answer_of_sixteen_tokens(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say("0123456789" * 5)
    reply = client.completions.create(model=MODEL, prompt="Hello")
    assert reply.object == "text_completion"
    assert stack.main.requests[0].prompt_tokens == stack.encode("Hello")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16
    assert (reply.choices[0].finish_reason, reply.choices[0].text) == ("length", "0123456789012345")


def test_the_default_limit_is_what_is_left(stack: Stack, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt=[5] * (CONTEXT - 3))
    assert stack.main.requests[0].max_new_tokens == 3


@pytest.mark.parametrize("n", [1, 2])
def test_batched_prompts_number_their_choices(stack: Stack, client: openai.OpenAI, n: int) -> None:
    prompts = ["Hello", "world", "again"]
    reply = client.completions.create(model=MODEL, prompt=prompts, n=n, max_tokens=50)
    assert [choice.index for choice in reply.choices] == list(range(3 * n))
    # The fake echoes, so every text says which prompt it answers.
    assert [choice.text for choice in reply.choices] == [p for p in prompts for _ in range(n)]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(len(stack.encode(prompt)) for prompt in prompts)


def test_token_prompts(stack: Stack, client: openai.OpenAI) -> None:
    tokens = stack.encode("Hello world")
    assert client.completions.create(model=MODEL, prompt=tokens).choices[0].text == "Hello world"
    reply = client.completions.create(model=MODEL, prompt=[tokens, tokens[:1]])
    assert [choice.text for choice in reply.choices] == [
        "Hello world",
        stack.tokenizer.decode(tokens[:1]),
    ]


@pytest.mark.parametrize("prompt", ["", None])
def test_an_empty_prompt_starts_a_document(
    stack: Stack, http: httpx.Client, prompt: str | None
) -> None:
    reply = http.post("/v1/completions", json={"model": MODEL, "prompt": prompt})
    assert reply.status_code == 200
    assert stack.main.requests[0].prompt_tokens == [0]


def test_best_of_as_many_as_n_means_nothing(stack: Stack, client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="Hello", n=2, best_of=2)
    assert len(reply.choices) == 2


def test_top_p_of_zero_is_greedy(stack: Stack, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="Hello", top_p=0)
    sampling = stack.main.requests[0].sampling
    assert (sampling.top_k, sampling.top_p) == (1, 1.0)


def test_ignore_eos(stack: Stack, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="Hello", extra_body={"ignore_eos": True})
    assert stack.main.requests[0].stop_tokens == []


def test_streaming(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say("Paris. Cold")
    stream = client.completions.create(model=MODEL, prompt="Hello", stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Paris. Cold"
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("stop") == 1
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_streaming_through_the_async_client(stack: Stack) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(
            base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=20
        ) as client:
            stream = await client.completions.create(model=MODEL, prompt="Hello", stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(ask()) == "Hello"


def test_a_body_without_a_content_type_is_still_json(stack: Stack, http: httpx.Client) -> None:
    reply = http.post("/v1/completions", content=f'{{"model": "{MODEL}", "prompt": "Hello"}}')
    assert reply.status_code == 200
