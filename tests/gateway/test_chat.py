"""Chat completions through the openai client."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import openai
import pytest
from openai.types.chat import ChatCompletionContentPartTextParam, ChatCompletionUserMessageParam

from tests.gateway.conftest import Stack
from tests.gateway.tiny_text import CONTEXT, MODEL

USER: ChatCompletionUserMessageParam = {"role": "user", "content": "Hello"}
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say("Paris, café 🤖.")
    reply = client.chat.completions.create(model=MODEL, messages=[USER])
    choice = reply.choices[0]
    assert choice.message.content == "Paris, café 🤖."
    assert (choice.message.role, choice.message.refusal) == ("assistant", None)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert (reply.object, reply.model) == ("chat.completion", MODEL)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(stack.encode(PROMPT))
    assert reply.usage.completion_tokens == len(stack.encode("Paris, café 🤖."))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_the_main_function_gets_the_templated_prompt(stack: Stack, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief"}, USER],
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": -100},
        seed=42,
        user="ignored",
        metadata={"also": "ignored"},
        store=False,
        extra_body={"top_k": 5, "min_p": 0.1, "never_heard_of": 1},
    )
    (asked,) = stack.main.requests
    assert asked.prompt_tokens == stack.encode("<|im_start|>system\nBe brief<|im_end|>\n" + PROMPT)
    assert asked.stop_tokens == [2]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0.5,
        0.9,
        5,
        0.1,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert (sampling.logit_bias, sampling.seed) == ({7: -100.0}, 42)


def test_text_parts_are_joined(stack: Stack, client: openai.OpenAI) -> None:
    parts: list[ChatCompletionContentPartTextParam] = [
        {"type": "text", "text": "Hel"},
        {"type": "text", "text": "lo"},
    ]
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert stack.main.requests[0].prompt_tokens == stack.encode(PROMPT.replace("Hello", "Hel\nlo"))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 9}, 9),
        ({"max_completion_tokens": 9, "max_tokens": 7}, 9),
        ({"max_tokens": None}, None),
    ],
)
def test_token_limits(
    stack: Stack, client: openai.OpenAI, limits: dict[str, int], expected: int | None
) -> None:
    client.chat.completions.create(model=MODEL, messages=[USER], extra_body=limits)
    rest = CONTEXT - len(stack.encode(PROMPT))
    assert stack.main.requests[0].max_new_tokens == (expected or rest)


def test_the_limit_ends_an_answer_with_length(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say("one two three four five six seven")
    reply = client.chat.completions.create(model=MODEL, messages=[USER], max_completion_tokens=3)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3


@pytest.mark.parametrize("stop", ["Par", ["zzz", "Par"], [" Par", "is. Cold"]])
@pytest.mark.parametrize("per_event", [1, 3, 50])
def test_stop_strings_are_withheld(
    stack: Stack, client: openai.OpenAI, stop: str | list[str], per_event: int
) -> None:
    stack.main.say("France is Paris. Cold experts", per_event=per_event)
    reply = client.chat.completions.create(model=MODEL, messages=[USER], stop=stop)
    assert (reply.choices[0].message.content or "").rstrip() == "France is"
    assert reply.choices[0].finish_reason == "stop"
    assert stack.main.requests[0].running_stats
    assert reply.model_extra is not None
    assert reply.model_extra["x_remoe"]["cost_usd"] > 0


def test_samples_have_seeds_of_their_own(stack: Stack, client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=[USER], n=3, seed=5)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    by_index = sorted(stack.main.requests, key=lambda request: request.request_id)
    seeds = [request.sampling.seed for request in by_index]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    stack.main.reset()
    client.chat.completions.create(model=MODEL, messages=[USER], n=3, seed=5)
    again = sorted(stack.main.requests, key=lambda request: request.request_id)
    assert [request.sampling.seed for request in again] == seeds


def test_streaming(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say("Paris, café 🤖.")
    stream = client.chat.completions.create(model=MODEL, messages=[USER], stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Paris, café 🤖."
    assert not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in chunks)
    finishes = [chunk.choices[0].finish_reason for chunk in chunks]
    assert finishes == [None] * (len(chunks) - 1) + ["stop"]
    assert all(a.id == b.id and a.created == b.created for a, b in pairwise(chunks))
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_streamed_samples_interleave_but_add_up(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say("The capital of France")
    stream = client.chat.completions.create(model=MODEL, messages=[USER], n=3, stream=True)
    texts, finishes = ["", "", ""], [0, 0, 0]
    for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] += choice.finish_reason is not None
    assert texts == ["The capital of France"] * 3
    assert finishes == [1, 1, 1]


def test_two_async_chats_at_once(stack: Stack) -> None:
    async def ask(client: openai.AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def both() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=20
        ) as client:
            return list(await asyncio.gather(ask(client, "first"), ask(client, "second")))

    # The fake echoes the prompt; special tokens are not text.
    assert asyncio.run(both()) == ["user\nfirst\nassistant\n", "user\nsecond\nassistant\n"]
