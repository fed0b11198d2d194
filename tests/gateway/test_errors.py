"""Every refusal is OpenAI's error object, with the status, class, code and place to look at."""

from __future__ import annotations

import json
import socket
import time

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.conftest import Stack
from tests.gateway.tiny_text import CONTEXT, MODEL

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
LONG = [{"role": "user", "content": "Hello " * CONTEXT}]


def error_of(reply: httpx.Response) -> dict[str, str | None]:
    """Check the envelope: four keys, strings or null, and return what is inside."""
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert len(error["message"]) > 20
    assert isinstance(error["type"], str)
    assert all(error[key] is None or isinstance(error[key], str) for key in ("param", "code"))
    assert reply.headers["x-request-id"]
    return error  # type: ignore[no-any-return]


def talk(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


def tool(name: str, parameters: dict[str, object] | None = None) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}


def called(arguments: str) -> dict[str, object]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def schema_format(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


UNSUPPORTED = "unsupported_parameter"
INVALID = "invalid_value"
CONTEXT_CODE = "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "change", "param", "code", "says"),
    [
        (CHAT, {"messages": []}, "messages", INVALID, "must not be empty"),
        (CHAT, {"messages": None}, "messages", INVALID, "Missing required"),
        (CHAT, {"messages": "hi"}, "messages", INVALID, "expected an array, got a string"),
        (CHAT, {"model": None}, "model", INVALID, "Missing required"),
        (CHAT, {"model": 3}, "model", INVALID, "expected a string"),
        (CHAT, talk({"role": "robot", "content": "x"}), "messages[0].role", INVALID, "'user'"),
        (CHAT, talk({"content": "x"}), "messages[0].role", INVALID, "Missing"),
        (CHAT, talk({"role": "user"}), "messages[0].content", INVALID, "Missing"),
        (CHAT, talk({"role": "user", "content": 5}), "messages[0].content", INVALID, "a string"),
        (CHAT, talk(MESSAGES[0], 7), "messages[1]", INVALID, "an object"),
        (
            CHAT,
            talk({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
            "messages[0].content[0].type",
            UNSUPPORTED,
            "text only",
        ),
        (
            CHAT,
            talk({"role": "user", "content": [{"type": "text"}]}),
            "messages[0].content[0].text",
            INVALID,
            "Missing",
        ),
        (
            CHAT,
            talk({"role": "user", "content": [{"type": "text", "text": 1}]}),
            "messages[0].content[0].text",
            INVALID,
            "a string",
        ),
        (
            CHAT,
            talk({"role": "function", "content": "x", "name": "f"}),
            "messages[0].role",
            UNSUPPORTED,
            "the role 'tool'",
        ),
        (
            CHAT,
            talk(MESSAGES[0], {"role": "assistant", "tool_calls": [{}]}),
            "messages[1].tool_calls[0].function",
            INVALID,
            "Missing",
        ),
        (
            CHAT,
            talk(MESSAGES[0], {"role": "assistant", "tool_calls": [called("[1]")]}),
            "messages[1].tool_calls[0].function.arguments",
            INVALID,
            "JSON object",
        ),
        (
            CHAT,
            talk({**MESSAGES[0], "tool_calls": [called("{}")]}),
            "messages[0].tool_calls",
            INVALID,
            "assistant's",
        ),
        (
            CHAT,
            talk({"role": "assistant", "content": "x"}),
            "messages",
            INVALID,
            "begins with the user",
        ),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function", INVALID, "Missing"),
        (CHAT, {"tools": [{"type": "custom"}]}, "tools[0].type", INVALID, "'function'"),
        (CHAT, {"tools": [tool("a b")]}, "tools[0].function.name", INVALID, "pattern"),
        (
            CHAT,
            {"tools": [tool("f", {"properties": {"x": {"type": "strange"}}})]},
            "tools[0].function.parameters",
            INVALID,
            "cannot be followed",
        ),
        (CHAT, {"tool_choice": "required"}, "tool_choice", INVALID, "together with 'tools'"),
        (CHAT, {"tool_choice": "any"}, "tool_choice", INVALID, "'required'"),
        (
            CHAT,
            {
                "tools": [tool("f")],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
            INVALID,
            "'g'",
        ),
        (
            CHAT,
            {"tools": [tool("f")], "response_format": {"type": "json_object"}},
            "response_format",
            INVALID,
            "cannot be combined",
        ),
        (CHAT, {"functions": [{"name": "f"}]}, "functions", UNSUPPORTED, "not supported"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", INVALID, "'text'"),
        (
            CHAT,
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            INVALID,
            "Missing",
        ),
        (
            CHAT,
            {"response_format": schema_format({"type": "array", "uniqueItems": True})},
            "response_format.json_schema.schema",
            INVALID,
            "uniqueItems",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_object"}, "ignore_eos": True},
            "ignore_eos",
            INVALID,
            "where it ends",
        ),
        (CHAT, {"logprobs": 3}, "logprobs", INVALID, "true or false"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", INVALID, "'logprobs': true"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", INVALID, "at most 20"),
        (CHAT, {"modalities": ["audio"]}, "modalities", UNSUPPORTED, "not supported"),
        (CHAT, {"audio": {}}, "audio", UNSUPPORTED, "not supported"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", UNSUPPORTED, "not supported"),
        (CHAT, {"temperature": 2.5}, "temperature", INVALID, "at most 2"),
        (CHAT, {"temperature": -1}, "temperature", INVALID, "at least 0"),
        (CHAT, {"temperature": "hot"}, "temperature", INVALID, "expected a number"),
        (CHAT, {"top_p": 1.5}, "top_p", INVALID, "at most 1"),
        (CHAT, {"top_k": -2}, "top_k", INVALID, "at least -1"),
        (CHAT, {"presence_penalty": 3}, "presence_penalty", INVALID, "at most 2"),
        (CHAT, {"n": 0}, "n", INVALID, "at least 1"),
        (CHAT, {"n": 129}, "n", INVALID, "at most 128"),
        (CHAT, {"n": 17}, "n", UNSUPPORTED, "16"),
        (CHAT, {"n": 1.5}, "n", INVALID, "a whole number"),
        (CHAT, {"n": True}, "n", INVALID, "a whole number"),
        (CHAT, {"seed": 2**63}, "seed", INVALID, "less than"),
        (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, "stop", INVALID, "at most 4"),
        (CHAT, {"stop": ["a", ""]}, "stop[1]", INVALID, "leave it out"),
        (CHAT, {"stop": 4}, "stop", INVALID, "a string"),
        (CHAT, {"stream": "yes"}, "stream", INVALID, "true or false"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", INVALID, "'stream'"),
        (
            CHAT,
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            INVALID,
            "true or false",
        ),
        (CHAT, {"logit_bias": {"hello": 1}}, "logit_bias", INVALID, "token id"),
        (CHAT, {"logit_bias": {"9999": 1}}, "logit_bias", INVALID, "token id"),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5", INVALID, "at most 100"),
        (CHAT, {"max_tokens": -1}, "max_tokens", INVALID, "at least 1"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", INVALID, "at least 1"),
        (CHAT, {"max_tokens": "5"}, "max_tokens", INVALID, "a whole number"),
        (CHAT, {"messages": LONG}, "messages", CONTEXT_CODE, "reduce the length of the messages"),
        (CHAT, {"max_tokens": CONTEXT}, "max_tokens", CONTEXT_CODE, "to at most 101"),
        (CHAT, {"messages": LONG, "stream": True}, "messages", CONTEXT_CODE, "maximum context"),
        (
            CHAT,
            {"chat_template_kwargs": {"messages": 1}},
            "chat_template_kwargs",
            INVALID,
            "may not",
        ),
        (COMPLETIONS, {"prompt": []}, "prompt", INVALID, "must not be empty"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt[0]", INVALID, "must not be empty"),
        (COMPLETIONS, {"prompt": 5}, "prompt", INVALID, "a string"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt[1]", INVALID, "a string"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt[1]", INVALID, "a whole number"),
        (COMPLETIONS, {"prompt": [[1], "a"]}, "prompt[1]", INVALID, "an array"),
        (COMPLETIONS, {"prompt": [1, -1]}, "prompt[1]", INVALID, "at least 0"),
        (COMPLETIONS, {"prompt": [1, 99999]}, "prompt", INVALID, "99999"),
        (COMPLETIONS, {"prompt": ["a"] * 33, "n": 2}, "prompt", INVALID, "66 choices"),
        (COMPLETIONS, {"prompt": [5] * CONTEXT}, "prompt", CONTEXT_CODE, "1024 tokens"),
        (COMPLETIONS, {"max_tokens": CONTEXT}, "max_tokens", CONTEXT_CODE, "1025 tokens"),
        (COMPLETIONS, {"max_tokens": -5}, "max_tokens", INVALID, "at least 0"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens", INVALID, "'echo': true"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs", INVALID, "at most 20"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", INVALID, "a whole number"),
        (COMPLETIONS, {"suffix": "end"}, "suffix", UNSUPPORTED, "not supported"),
        (COMPLETIONS, {"best_of": 21}, "best_of", INVALID, "at most 20"),
        (COMPLETIONS, {"best_of": 2, "n": 3}, "best_of", INVALID, "at least 'n'"),
        (COMPLETIONS, {"best_of": 3, "stream": True}, "best_of", INVALID, "cannot be streamed"),
        ("/tokenize", {}, "prompt", INVALID, "either"),
        ("/detokenize", {"tokens": [99999]}, "tokens", INVALID, "99999"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]", INVALID, "a whole number"),
    ],
)
def test_refusals(
    stack: Stack,
    http: httpx.Client,
    path: str,
    change: dict[str, object],
    param: str,
    code: str,
    says: str,
) -> None:
    bases: dict[str, dict[str, object]] = {
        CHAT: {"messages": MESSAGES},
        COMPLETIONS: {"prompt": "H"},
    }
    reply = http.post(path, json={"model": MODEL, **bases.get(path, {}), **change})
    error = error_of(reply)
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code), error
    assert says in str(error["message"])
    assert stack.main.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"logprobs": False, "modalities": ["text"], "service_tier": "auto", "temperature": None},
        {"top_k": -1, "stop": [], "stop_token_ids": [1], "prediction": {}},
    ],
)
def test_fields_that_change_nothing_pass(
    stack: Stack, http: httpx.Client, fields: dict[str, object]
) -> None:
    reply = http.post(CHAT, json={"model": MODEL, "messages": MESSAGES, **fields})
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"not json", b"\xff\xfe", b'{"model": NaN}', b'"text"', b"[1]", b"[" * 100_000],
)
def test_malformed_bodies(stack: Stack, http: httpx.Client, body: bytes) -> None:
    reply = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "JSON" in str(error_of(reply)["message"])


def test_unpaired_surrogates(stack: Stack, http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "prompt": "\ud800"})
    reply = http.post(COMPLETIONS, content=body)
    assert reply.status_code == 400
    error_of(reply)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_too_large(stack: Stack, http: httpx.Client, declared: bool) -> None:
    body = b'{"prompt": "' + b"x" * 9_000_000
    reply = http.post(COMPLETIONS, content=body if declared else iter([body]))
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (413, "request_too_large")
    assert "8,000,000" in str(error["message"])
    assert http.get("/healthz").status_code == 200


def test_unknown_model(stack: Stack, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_the_client_raises_its_own_classes(stack: Stack, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=LONG)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x", suffix="y", stream=True)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("POST", "/v1/completions/", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_supported"),
        ("DELETE", f"/v1/models/{MODEL}", 405, "method_not_supported"),
    ],
)
def test_unknown_paths_and_methods(
    stack: Stack, http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    reply = http.request(method, path)
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (status, code)
    assert path in str(error["message"])
    assert ("allow" in reply.headers) == (status == 405)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = [
    "messages",
    "prompt",
    "stop",
    "n",
    "seed",
    "logit_bias",
    "stream_options",
    "max_tokens",
    "temperature",
    "top_p",
    "best_of",
    "echo",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "tools",
    "model_config",
    "chat_template_kwargs",
]
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.sampled_from(["user", "tool"]) | json_values, "content": json_values},
    ),
    max_size=3,
)


@settings(
    deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    base=messages | st.just(MESSAGES),
    changes=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
)
def test_no_body_makes_the_server_fail(
    stack: Stack, http: httpx.Client, path: str, base: object, changes: dict[str, object]
) -> None:
    body = {"model": MODEL, "messages": base, "prompt": "Hello", "max_tokens": 2, **changes}
    reply = http.post(path, content=json.dumps(body))
    assert reply.status_code in {200, 400}, reply.text
    if reply.status_code == 400:
        error_of(reply)


def test_a_body_that_does_not_arrive_is_given_up(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.validation._BODY_TIMEOUT_S", 0.1)
    address = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), 10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
        )
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in reply
    assert b"connection: close" in reply
    assert stack.main.requests == []


def test_a_clock_that_jumps_changes_nothing_but_the_date(
    stack: Stack, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.main.say("Paris")
    real = time.time
    for jump_s in (-86_400 * 365, 86_400 * 365):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
            reply = client.completions.create(
                model=MODEL, prompt="x", extra_headers={"x-remoe-timeout-s": "5"}
            )
        assert reply.choices[0].text == "Paris"
        assert reply.created == pytest.approx(real() + jump_s, abs=60)
        receipt = (reply.model_extra or {})["x_remoe"]
        assert 0 <= receipt["gateway_ms"] <= receipt["ttft_ms"] < 5_000
