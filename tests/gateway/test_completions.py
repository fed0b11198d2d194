"""Text completions through the openai client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from remoe.generation import GenerateEvent, GenerateRequest
from tests.gateway.conftest import Stack
from tests.gateway.fakes import Gate, scored, stats
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


def test_echo_begins_the_text_with_the_prompt(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say(" Paris")
    reply = client.completions.create(model=MODEL, prompt="The capital is", echo=True, n=2)
    assert [choice.text for choice in reply.choices] == ["The capital is Paris"] * 2
    tokens = stack.encode("Hello world")
    chunks = client.completions.create(model=MODEL, prompt=tokens, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello world Paris"
    # A stop string is not looked for in the prompt.
    reply = client.completions.create(model=MODEL, prompt="The end", echo=True, stop=["The"])
    assert reply.choices[0].text == "The end Paris"


def test_a_prompt_is_scored_without_an_answer(stack: Stack, client: openai.OpenAI) -> None:
    prompt = "Cold experts"
    reply = client.completions.create(
        model=MODEL, prompt=prompt, echo=True, max_tokens=0, logprobs=1
    )
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == (prompt, "length")
    tokens = stack.encode(prompt)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == prompt
    assert logprobs.token_logprobs == [None, *(-token / 100 for token in tokens[1:])]
    assert (logprobs.top_logprobs or [])[:1] == [None]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(tokens), 0)
    asked = stack.main.requests[0]
    assert (asked.max_new_tokens, asked.prompt_logprobs, asked.logprobs) == (0, 1, 1)


def test_a_prompt_that_fills_the_context_can_be_scored(stack: Stack, client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=[5] * CONTEXT, echo=True, max_tokens=0, logprobs=0
    )
    assert reply.usage is not None
    assert reply.usage.total_tokens == CONTEXT


def test_the_best_of_several_is_the_likeliest_by_token(stack: Stack, client: openai.OpenAI) -> None:
    # The fake's log-probability of a token is minus its id.
    texts = [" world", "a", "Hello", "b"]
    order = sorted(texts, key=lambda text: max(stack.encode(text)))
    answers = iter(texts)

    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        tokens = stack.encode(next(answers))
        yield GenerateEvent(tokens=tokens, logprobs=[scored(token, 0) for token in tokens])
        yield GenerateEvent(finish="stop", stats=stats(request, len(tokens)))

    assert all(len(stack.encode(text)) == 1 for text in texts)
    stack.main.script = script
    reply = client.completions.create(model=MODEL, prompt="x", n=2, best_of=4)
    assert [choice.text for choice in reply.choices] == order[:2]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in reply.choices)
    # All four were computed, and are paid for.
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 4


def test_further_choices_wait_for_the_first_one_s_prompt(
    stack: Stack, client: openai.OpenAI
) -> None:
    gate = Gate()
    seen: list[GenerateRequest] = []

    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        if not seen:
            seen.append(request)
            await gate.passed()
            # Nobody else has come while the first one had no token.
            assert len(stack.main.requests) == 1
        yield GenerateEvent(tokens=stack.encode("Paris"))
        yield GenerateEvent(finish="stop", stats=stats(request, 1))

    stack.main.script = script
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.completions.create, model=MODEL, prompt="Hello", n=3)
        stack.main.arrived.wait()
        gate.open()
        assert [choice.text for choice in asked.result(20).choices] == ["Paris"] * 3


def test_tokens_there_and_back(stack: Stack, http: httpx.Client) -> None:
    text = "Hello world, né 漢"
    tokens = stack.encode(text)
    reply = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply.pop("token_strs") == [stack.tokenizer.id_to_token(token) for token in tokens]
    assert reply == {"count": len(tokens), "max_model_len": CONTEXT, "tokens": tokens}
    back = http.post("/detokenize", json={"model": MODEL, "tokens": tokens})
    assert back.json() == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    laid_out = http.post("/tokenize", json=chat).json()["tokens"]
    http.post("/v1/chat/completions", json={"model": MODEL, **chat})
    assert stack.main.requests[-1].prompt_tokens == laid_out
    other = http.post("/tokenize", json={"model": "gpt-5", "prompt": "x"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
