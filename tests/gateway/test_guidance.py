"""Answers of a given shape: what is asked of the main function, and tool calls read from text."""

from __future__ import annotations

import json
from itertools import pairwise

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from gateway.chat_template import ChatTemplate
from gateway.conversation import turns
from gateway.requests import Message, Tool
from gateway.tool_calls import CALL_BEGIN, CALL_END, ParsedCall, ToolCallParser
from tests.gateway.conftest import Stack
from tests.gateway.tiny_text import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Weather in Paris?"}]}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]


def call(name: str, arguments: object) -> str:
    return f"{CALL_BEGIN}{json.dumps({'name': name, 'arguments': arguments})}{CALL_END}"


WEATHER = call("weather", {"city": "Paris"})
NOW = call("now", {})


@pytest.fixture(scope="module")
def vocabulary(tokenizer: object) -> LLTokenizer:
    return LLTokenizer(tokenizer.to_str())  # type: ignore[attr-defined]


def accepts(stack: Stack, vocabulary: LLTokenizer, text: str) -> bool:
    """Whether the grammar that the main function was last sent allows a text."""
    grammar = stack.main.requests[-1].grammar
    assert grammar is not None
    matcher = LLMatcher(vocabulary, grammar)
    tokens = stack.encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_a_json_schema_becomes_a_grammar(
    stack: Stack, client: openai.OpenAI, vocabulary: LLTokenizer
) -> None:
    stack.main.say('{"city": "Paris"}')
    reply = client.chat.completions.create(
        **CHAT,  # type: ignore[call-overload]
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "place", "schema": PARAMETERS},
        },
    )
    assert json.loads(reply.choices[0].message.content) == {"city": "Paris"}
    assert accepts(stack, vocabulary, '{"city": "Paris", "days": 3}')
    for bad in (
        '{"city": 3}',
        "{}",
        "Paris",
        '{"city": "Paris"',
        '{"city": "Paris",\n\n"days": 3}',
    ):
        assert not accepts(stack, vocabulary, bad)


def test_json_object_is_any_object(
    stack: Stack, http: httpx.Client, vocabulary: LLTokenizer
) -> None:
    http.post("/v1/chat/completions", json={**CHAT, "response_format": {"type": "json_object"}})
    assert accepts(stack, vocabulary, '{"a": [1, {"b": null}]}')
    assert not accepts(stack, vocabulary, "[1]")
    http.post("/v1/chat/completions", json={**CHAT, "response_format": {"type": "text"}})
    assert stack.main.requests[-1].grammar is None


@pytest.mark.parametrize(
    ("fields", "allowed", "refused"),
    [
        ({}, ["Hello", WEATHER, f"Hm. {WEATHER}\n{NOW}"], [call("weather", {}), call("x", {})]),
        ({"parallel_tool_calls": False}, ["Hello", WEATHER], [f"{WEATHER}\n{NOW}"]),
        ({"tool_choice": "auto"}, ["Hello", NOW], [call("x", {})]),
        ({"tool_choice": "required"}, [WEATHER, f"{WEATHER}\n{NOW}"], ["Hello", f"Hm. {NOW}"]),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            [WEATHER],
            ["Hello", f"{WEATHER}\n{NOW}"],
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "now"}}},
            [NOW],
            ["Hello", WEATHER],
        ),
    ],
)
def test_tool_choices(
    stack: Stack,
    http: httpx.Client,
    vocabulary: LLTokenizer,
    fields: dict[str, object],
    allowed: list[str],
    refused: list[str],
) -> None:
    reply = http.post("/v1/chat/completions", json={**CHAT, "tools": TOOLS, **fields})
    assert reply.status_code == 200, reply.text
    assert [text for text in allowed if not accepts(stack, vocabulary, text)] == []
    assert [text for text in refused if accepts(stack, vocabulary, text)] == []


def test_tool_calls_in_an_answer(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say(f"Let me see. {WEATHER}\n{NOW}")
    reply = client.chat.completions.create(**CHAT, tools=TOOLS)  # type: ignore[call-overload]
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see. "
    calls = choice.message.tool_calls
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("function", "weather", {"city": "Paris"}),
        ("function", "now", {}),
    ]
    assert len({c.id for c in calls}) == 2
    # A full round: the calls and their results go back as messages.
    stack.main.say("Sunny.")
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[
            *CHAT["messages"],  # type: ignore[list-item]
            choice.message,
            *(
                {"role": "tool", "tool_call_id": c.id, "content": "sun"}  # type: ignore[list-item]
                for c in calls
            ),
        ],
        tools=TOOLS,  # type: ignore[arg-type]
    )
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("Sunny.", "stop")
    asked = stack.tokenizer.decode(stack.main.requests[-1].prompt_tokens)
    assert WEATHER in asked
    assert asked.count("<tool_response>\nsun\n</tool_response>") == 2


def test_streamed_tool_calls_are_put_together_by_the_client(
    stack: Stack, client: openai.OpenAI
) -> None:
    stack.main.say(f"{WEATHER}\n{NOW}", per_event=3)
    with client.chat.completions.stream(**CHAT, tools=TOOLS) as stream:  # type: ignore[arg-type]
        reply = stream.get_final_completion()
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert [c.function.name for c in choice.message.tool_calls or []] == ["weather", "now"]


def test_a_call_cut_short_is_text(stack: Stack, client: openai.OpenAI) -> None:
    stack.main.say(WEATHER)
    reply = client.chat.completions.create(**CHAT, tools=TOOLS, max_tokens=12)  # type: ignore[call-overload]
    (choice,) = reply.choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert WEATHER.startswith(choice.message.content)


def test_with_choice_none_the_model_hears_of_no_tools(stack: Stack, http: httpx.Client) -> None:
    stack.main.say(WEATHER)
    body = {**CHAT, "tools": TOOLS, "tool_choice": "none"}
    reply = http.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == WEATHER
    assert stack.main.requests[-1].grammar is None
    assert b"<tools>" not in stack.tokenizer.decode(stack.main.requests[-1].prompt_tokens).encode()


def test_a_template_s_own_way_with_tools_is_used() -> None:
    template = ChatTemplate(
        "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls %}<tool_call>{{ c.function.arguments.city }}{% endfor %}"
        "{% endfor %}",
        {},
    )
    assert template.knows_tools
    assert template.speaks_hermes
    messages = [
        Message.model_validate(
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
            }
        ),
        Message.model_validate({"role": "tool", "content": "sun"}),
    ]
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    text = template.render(
        turns(messages, tools, native_tools=True), tools=[tool.model_dump() for tool in tools]
    )
    assert text == "[weather][now]assistant:<tool_call>Paristool:sun"


texts = st.text(alphabet="ab <\n{", max_size=6)
calls = st.builds(
    call,
    st.sampled_from(["f", "g"]),
    st.dictionaries(st.sampled_from("xy"), st.sampled_from([1, "</tool_call>", "é\n"]), max_size=2),
)


@given(
    parts=st.lists(calls, max_size=3),
    head=texts,
    tail=texts,
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_calls_are_found_however_the_text_is_cut(
    parts: list[str], head: str, tail: str, cuts: list[int]
) -> None:
    text = head + "\n".join(parts) + tail
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    parser = ToolCallParser()
    said, found = "", list[ParsedCall]()
    for start, end in pairwise(borders):
        more, calls = parser.push(text[start:end])
        said += more
        found += calls
    said += parser.flush()
    assert [call(c.name, json.loads(c.arguments)) for c in found] == parts
    assert [c.index for c in found] == list(range(len(parts)))
    assert said == (head + tail.lstrip() if parts else head + tail)
