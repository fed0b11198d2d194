"""The event stream, byte by byte: shape, heartbeats, failures, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import openai
import pytest
from starlette.responses import PlainTextResponse

from remoe.generation import GenerateEvent, GenerateRequest
from remoe.ledger import Ledger
from tests.gateway.conftest import Stack, eventually, openai_client
from tests.gateway.fakes import Gate, stats
from tests.gateway.tiny_text import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": True}


def events(reply: httpx.Response) -> list[str]:
    """Split a finished stream; every event ends with an empty line."""
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.text.endswith("\n\n")
    return reply.text[:-2].split("\n\n")


def payloads(lines: list[str]) -> list[dict[str, object]]:
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": MODEL, "prompt": "Hello", "stream": True}),
    ],
)
def test_usage_comes_only_when_asked_and_alone(
    stack: Stack, http: httpx.Client, path: str, body: dict[str, object]
) -> None:
    plain = payloads(events(http.post(path, json=body)))
    assert not any("usage" in chunk for chunk in plain)
    assert ["x_remoe" in chunk for chunk in plain] == [False] * (len(plain) - 1) + [True]

    asked = {**body, "stream_options": {"include_usage": True}}
    *chunks, last = payloads(events(http.post(path, json=asked)))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert not any("x_remoe" in chunk for chunk in chunks)
    assert last["choices"] == []
    usage = last["usage"]
    assert isinstance(usage, dict)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "x_remoe" in last


def test_chunks_have_every_required_key(stack: Stack, http: httpx.Client) -> None:
    stack.main.say("Paris")
    chunks = payloads(events(http.post("/v1/chat/completions", json=CHAT)))
    for chunk in chunks:
        assert {"id", "object", "created", "model", "choices"} <= chunk.keys()
        choices = chunk["choices"]
        assert isinstance(choices, list)
        assert choices[0].keys() == {"index", "delta", "logprobs", "finish_reason"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]  # type: ignore[index]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(delta.keys() == {"content"} for delta in deltas[1:-1])


@pytest.mark.parametrize("per_event", [1, 2, 100])
def test_no_part_of_a_stop_string_is_streamed(
    stack: Stack, http: httpx.Client, per_event: int
) -> None:
    stack.main.say("France is Paris. Cold experts", per_event=per_event)
    body = {**CHAT, "stop": ["Paris. Cold"]}
    chunks = payloads(events(http.post("/v1/chat/completions", json=body)))
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]  # type: ignore[index]
    assert "".join(texts) == "France is "
    assert not any("P" in text for text in texts)


@pytest.mark.parametrize("ready_for_ms", [0.0, 40.0])
def test_a_sleeping_main_function_is_waited_for_with_heartbeats(
    stack: Stack, serve_gateway: Callable[..., str], ready_for_ms: float
) -> None:
    stack.main.before_headers = gate = Gate()
    stack.main.ready_for_ms = ready_for_ms
    url = serve_gateway(heartbeat_s=0.05)
    stack.main.start_ms = "30,20"
    asked = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT, timeout=20) as reply:
        assert reply.status_code == 200
        lines = (line for line in reply.iter_lines() if line)
        stack.main.arrived.wait()
        arrived = time.perf_counter()
        assert next(lines).startswith(": remoe phase=starting waited_s=0.")
        assert next(lines).startswith(": remoe phase=starting waited_s=0.")
        at_least_ms = (time.perf_counter() - arrived) * 1e3 - ready_for_ms
        gate.open()
        rest = [line for line in lines if not line.startswith(":")]
    at_most_ms = (time.perf_counter() - asked) * 1e3 - ready_for_ms
    receipt = json.loads(rest[-2].removeprefix("data: "))["x_remoe"]
    # The replica says how long it had been ready; the rest of the wait was its cold start.
    cold = receipt["cold_start"]
    assert at_least_ms <= cold["main_ms"] <= at_most_ms
    # Its parts, counted backwards from when it was ready.
    load_ms = min(20, cold["main_ms"])
    assert cold["load_ms"] == load_ms
    assert cold["boot_ms"] == pytest.approx(min(30, cold["main_ms"] - load_ms), abs=0.01)
    parts = cold["activation_ms"] + cold["boot_ms"] + cold["load_ms"]
    assert parts == pytest.approx(cold["main_ms"], abs=0.01)
    assert cold["experts_ms"] == 125
    assert receipt["cold_start_ms"] == pytest.approx(receipt["cold_start"]["main_ms"] + 125)


def test_the_openai_client_does_not_see_heartbeats(
    stack: Stack, serve_gateway: Callable[..., str]
) -> None:
    pause = Gate()

    async def slow(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        await pause.passed()
        yield GenerateEvent(tokens=stack.encode(" is"), finish="stop", stats=stats(request, 2))

    stack.main.script = slow
    with openai_client(serve_gateway(heartbeat_s=0.02)) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        texts = []
        for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")
            pause.open()
    assert "".join(texts) == "Paris is"


def test_a_failure_after_heartbeats_is_an_error_event(
    stack: Stack, serve_gateway: Callable[..., str]
) -> None:
    stack.main.before_headers = gate = Gate()
    stack.main.refusal = PlainTextResponse("activator request timeout", status_code=503)
    url = serve_gateway(heartbeat_s=0.05)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT, timeout=20) as reply:
        lines = (line for line in reply.iter_lines() if line)
        assert next(lines).startswith(":")
        gate.open()
        rest = [line for line in lines if not line.startswith(":")]
    (event,) = rest
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "model_loading"


def breaking(stack: Stack, how: str) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        if how == "error event":
            yield GenerateEvent(finish="error", error="/srv/model/secret.bin is gone")

    stack.main.script = script


@pytest.mark.parametrize("how", ["error event", "end without finish"])
def test_a_failure_in_the_middle_is_an_error_event(
    stack: Stack, client: openai.OpenAI, http: httpx.Client, how: str
) -> None:
    breaking(stack, how)
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], stream=True
    )
    texts: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        texts.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert caught.value.code == "generation_interrupted"
    assert "".join(texts) in {"", "Paris"}
    reply = http.post("/v1/chat/completions", json=CHAT)
    assert "Paris" in reply.text
    assert "secret" not in reply.text
    assert "[DONE]" not in reply.text
    assert events(reply)[-1].startswith('data: {"error":')


def lost_at_first(stack: Stack, text: str, *, times: int) -> None:
    """The main function is gone after its first event, and its successor answers."""
    left = iter(range(times))

    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        tokens = stack.encode(text)
        yield GenerateEvent(ledger=Ledger(main_cpu_gb_s=1.0))
        if next(left, None) is not None:
            if not request.sampling.temperature:
                yield GenerateEvent(tokens=tokens[:1])
            return
        yield GenerateEvent(tokens=tokens)
        yield GenerateEvent(finish="stop", stats=stats(request, len(tokens)))

    stack.main.script = script


@pytest.mark.parametrize(("stream", "temperature"), [(False, 0), (False, 1), (True, 1)])
def test_what_no_client_has_seen_begins_anew_on_the_successor(
    stack: Stack, http: httpx.Client, stream: bool, temperature: float
) -> None:
    lost_at_first(stack, "Paris is a city", times=1)
    reply = http.post(
        "/v1/chat/completions", json={**CHAT, "stream": stream, "temperature": temperature}
    )
    assert reply.status_code == 200
    said = (
        "".join(
            json.loads(event.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
            for event in events(reply)
            if event != "data: [DONE]"
        )
        if stream
        else reply.json()["choices"][0]["message"]["content"]
    )
    assert said == "Paris is a city"
    assert len(stack.main.requests) == 2


def test_what_a_client_has_seen_does_not_begin_anew(stack: Stack, http: httpx.Client) -> None:
    lost_at_first(stack, "Paris is a city", times=1)
    reply = http.post("/v1/chat/completions", json={**CHAT, "temperature": 0})
    assert "generation_interrupted" in events(reply)[-1]
    assert len(stack.main.requests) == 1


def test_an_answer_begins_anew_only_once(stack: Stack, http: httpx.Client) -> None:
    lost_at_first(stack, "Paris is a city", times=2)
    reply = http.post("/v1/chat/completions", json={**CHAT, "stream": False})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "generation_interrupted")
    assert len(stack.main.requests) == 2


@pytest.mark.parametrize("how", ["error event", "end without finish"])
def test_a_failure_in_the_middle_of_a_whole_answer_is_not_to_be_retried(
    stack: Stack, http: httpx.Client, how: str
) -> None:
    breaking(stack, how)
    reply = http.post("/v1/chat/completions", json={**CHAT, "stream": False})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "generation_interrupted"
    assert reply.headers["x-should-retry"] == "false"
    assert "secret" not in reply.text


def endless(stack: Stack) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        await asyncio.Event().wait()

    stack.main.script = script


def test_a_streaming_client_that_leaves_cancels_the_generation(
    stack: Stack, serve_gateway: Callable[..., str]
) -> None:
    endless(stack)
    url = serve_gateway()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT, timeout=20) as reply:
        assert "assistant" in next(line for line in reply.iter_lines() if line)
    stack.main.cancelled.wait()
    stack.main.reset()
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=20).status_code == 200
    wanted = {
        f'remoe_requests_total{{route="/v1/chat/completions",status="{status}"}} 1.0'
        for status in (200, 499)
    }
    eventually(lambda: wanted <= set(httpx.get(f"{url}/metrics").text.splitlines()))


def test_a_waiting_client_that_leaves_cancels_the_generation(
    stack: Stack, http: httpx.Client
) -> None:
    endless(stack)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json={**CHAT, "stream": False}, timeout=0.5)
    stack.main.cancelled.wait()


def test_one_failed_sample_cancels_the_others(stack: Stack, http: httpx.Client) -> None:
    first = iter([True])

    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        if next(first, False):
            yield GenerateEvent(finish="error", error="out of memory")
        await asyncio.Event().wait()

    stack.main.script = script
    reply = http.post("/v1/chat/completions", json={**CHAT, "stream": False, "n": 2})
    assert reply.json()["error"]["code"] == "generation_interrupted"
    stack.main.cancelled.wait()


def test_a_found_stop_string_cancels_the_generation(stack: Stack, http: httpx.Client) -> None:
    def tokens() -> Iterator[int]:
        yield from stack.encode("France is Paris. Cold")

    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        for count, token in enumerate(tokens(), start=1):
            yield GenerateEvent(tokens=[token], stats=stats(request, count))
        await asyncio.Event().wait()

    stack.main.script = script
    reply = http.post("/v1/chat/completions", json={**CHAT, "stream": False, "stop": "Paris"})
    assert reply.json()["choices"][0]["message"]["content"] == "France is "
    stack.main.cancelled.wait()
    receipt = reply.json()["x_remoe"]
    # Tokens that came with the one that ended the text were computed, if not asked for.
    used = (receipt["main_gb_s"] - 1.0) / 2.0
    assert reply.json()["usage"]["completion_tokens"] <= used <= len(list(tokens()))
