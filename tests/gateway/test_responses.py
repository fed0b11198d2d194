"""`/v1/responses` through the openai client: text in, text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from remoe.generation import GenerateEvent, GenerateRequest
from tests.gateway.conftest import Stack
from tests.gateway.tiny_text import MODEL

ANSWER = "Paris, café 🤖."
PROMPT = (
    "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\n"
)
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def test_a_whole_reply(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say(ANSWER)
    reply = client.responses.create(
        model=MODEL, instructions="Be brief", input="Hello", temperature=0.5, store=False
    )
    assert (reply.output_text, reply.status, reply.error) == (ANSWER, "completed", None)
    assert (reply.instructions, reply.temperature) == ("Be brief", 0.5)
    assert stack.main.requests[-1].prompt_tokens == stack.encode(PROMPT)
    assert reply.usage is not None
    assert reply.usage.input_tokens == len(stack.encode(PROMPT))
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert (reply.model_extra or {})["x_remoe"]["cost_usd"] > 0


def test_the_events_of_a_stream(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say(ANSWER)
    events = list(client.responses.create(model=MODEL, input="Hello", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [*ORDER, "response.completed"]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == text == ANSWER
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == len(stack.encode(ANSWER))


def test_the_clients_own_stream_helper(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say(ANSWER)
    with client.responses.stream(model=MODEL, input="Hello") as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_the_async_client(stack: Stack) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
            return (await client.responses.create(model=MODEL, input="Hello")).output_text

    stack.main.say(ANSWER)
    assert asyncio.run(ask()) == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_cut_by_its_limit_is_incomplete(
    stack: Stack, client: openai.OpenAI, stream: bool
) -> None:
    stack.main.say(ANSWER)
    reply: Any = client.responses.create(
        model=MODEL, input="Hello", max_output_tokens=2, stream=stream
    )
    if stream:
        last = list(reply)[-1]
        assert last.type == "response.incomplete"
        reply = last.response
    assert (reply.status, reply.max_output_tokens) == ("incomplete", 2)
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert stack.main.requests[-1].max_new_tokens == 2


def test_a_reply_can_be_part_of_the_next_input(stack: Stack, client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="Hello")
    said = [item.model_dump() for item in first.output]
    items: Any = [{"role": "user", "content": "Hello"}, *said, {"role": "user", "content": "Again"}]
    client.responses.create(model=MODEL, input=items)
    prompt = stack.tokenizer.decode(
        stack.main.requests[-1].prompt_tokens, skip_special_tokens=False
    )
    assert prompt.count("<|im_start|>") == 4
    assert "Again" in prompt


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "unsupported_parameter"),
        ({"text": {"format": {"type": "json_object"}}}, "text", "unsupported_parameter"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"role": "user"}]}, "input[0].content", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "unsupported_parameter",
        ),
        ({"input": []}, "input", "invalid_value"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "context_length_exceeded"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    stack: Stack, client: openai.OpenAI, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, **{"input": "Hello", **fields})
    assert (refused.value.param, refused.value.code) == (param, code)
    assert stack.main.requests == []


def test_a_stream_that_fails_ends_with_an_error_event(stack: Stack, http: httpx.Client) -> None:
    async def fails(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        yield GenerateEvent(finish="error", error="secret")

    stack.main.script = fails
    body = {"model": MODEL, "input": "Hello", "stream": True}
    text = http.post("/v1/responses", json=body).text
    last = text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")
    assert '"code":"generation_interrupted"' in last
    assert "secret" not in text
