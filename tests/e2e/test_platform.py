"""From nothing to an answer and back to nothing, with every program real and the model tiny."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from tokenizers import Tokenizer

from tests.e2e.platform import Platform
from tests.gateway.tiny_text import write_model
from tests.otlp import Collector
from tests.tiny_model import build_tiny_checkpoint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that can also be spoken to."""
    folder = write_model(tmp_path_factory.mktemp("tiny-moe"))
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    build_tiny_checkpoint(folder, vocabulary=vocabulary)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
    return folder


@pytest.fixture(scope="module")
def platform(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    home = tmp_path_factory.mktemp("home")
    with Platform(model_dir, home, "--layers-per-function", "1", "--window", "6s") as platform:
        yield platform


def ask(platform: Platform, text: str, tokens: int = 40) -> tuple[str, dict[str, Any]]:
    """A greedy answer that does not end early, and its `x_remoe`."""
    reply = platform.client.completions.create(
        model=platform.client.models.list().data[0].id,
        prompt=text,
        max_tokens=tokens,
        temperature=0,
        logit_bias={"2": -100},
    )
    assert reply.model_extra is not None
    return reply.choices[0].text, reply.model_extra["x_remoe"]


def asleep(platform: Platform) -> bool:
    return all(function["state"] == "zero" for function in platform.experts())


def test_experts_sleep_wake_for_a_request_and_sleep_again(platform: Platform) -> None:
    platform.wait_for(lambda: asleep(platform), within_s=40)
    cold, cold_receipt = ask(platform, "Hello world")
    assert any(function["state"] == "ready" for function in platform.experts())
    assert cold_receipt["cold_start"]["experts_ms"] > 0
    assert cold_receipt["remote_calls"] > 0
    assert cold_receipt["cost_usd"] > 0
    warm, warm_receipt = ask(platform, "Hello world")
    assert warm == cold
    assert warm_receipt["cold_start_ms"] == 0
    platform.wait_for(lambda: asleep(platform), within_s=40)
    assert all(function["cold_starts"] >= 1 for function in platform.experts())


def test_looking_wakes_nothing(platform: Platform) -> None:
    platform.wait_for(lambda: asleep(platform), within_s=40)
    before = [function["cold_starts"] for function in platform.experts()]
    for _ in range(5):
        for path in ("/", "/healthz", "/readyz", "/metrics", "/v1/models", "/dashboard/state"):
            assert httpx.get(f"http://127.0.0.1:{platform.port}{path}").status_code == 200
    assert asleep(platform)
    assert [function["cold_starts"] for function in platform.experts()] == before


def test_a_reply_has_both_ledgers(platform: Platform) -> None:
    _, receipt = ask(platform, "Hello world")
    busy_gb_s = receipt["main_gb_s"] + receipt["remote_gb_s"]
    resident = receipt["resident"]
    parts = ("main_gb_s", "experts_gb_s", "services_gb_s")
    assert resident["gb_s"] == pytest.approx(sum(resident[part] for part in parts), abs=1e-5)
    assert 0 < busy_gb_s < resident["gb_s"]
    assert resident["experts_gb_s"] > 0
    assert 0 < receipt["cost_usd"] < resident["cost_usd"]


def test_concurrent_streams_answer_as_if_alone(platform: Platform) -> None:
    prompts = ["The capital of France", "Cold experts sleep", "a model answers"]
    alone = [ask(platform, prompt)[0] for prompt in prompts]

    def streamed(prompt: str) -> str:
        chunks = platform.client.completions.create(
            model=platform.client.models.list().data[0].id,
            prompt=prompt,
            max_tokens=40,
            temperature=0,
            logit_bias={"2": -100},
            stream=True,
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(streamed, prompts)) == alone


def test_killed_experts_change_no_answer_and_are_counted(platform: Platform) -> None:
    expected, _ = ask(platform, "user", tokens=400)
    chunks = platform.client.completions.create(
        model=platform.client.models.list().data[0].id,
        prompt="user",
        max_tokens=400,
        temperature=0,
        logit_bias={"2": -100},
        stream=True,
    )
    text = ""
    receipt: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        if number == 5:
            for pid in platform.pids_of("expert_fn"):
                os.kill(pid, signal.SIGKILL)
        text += chunk.choices[0].text
        receipt = (chunk.model_extra or {}).get("x_remoe") or receipt
    assert text == expected
    # Killed during a call, or between two: then the next call finds nobody and waits for a start.
    counts = ("remote_retries", "remote_hedges", "local_fallbacks")
    assert sum(receipt[name] for name in counts) or receipt["cold_start"]["experts_ms"] > 0
    assert sum(function["crashes"] for function in platform.experts()) > 0
    assert "was killed by SIGKILL" in platform.output()


def test_scores_shapes_and_calls_come_from_the_model_itself(platform: Platform) -> None:
    client = platform.client
    model = client.models.list().data[0].id
    said = client.completions.create(
        model=model, prompt="The capital", max_tokens=8, temperature=0, logprobs=2, echo=True
    ).choices[0]
    scored = client.completions.create(
        model=model, prompt=said.text, max_tokens=0, logprobs=2, echo=True
    ).choices[0]
    assert said.logprobs is not None
    assert scored.logprobs is not None
    # What the model wrote, it scores alike when it reads it; the text may be cut differently.
    if said.logprobs.tokens == scored.logprobs.tokens:
        assert scored.logprobs.token_logprobs is not None
        assert said.logprobs.token_logprobs is not None
        for wrote, read in zip(
            said.logprobs.token_logprobs[1:], scored.logprobs.token_logprobs[1:], strict=True
        ):
            assert read == pytest.approx(wrote, abs=0.02)
    schema = {
        "type": "object",
        "properties": {"sky": {"enum": ["clear", "grey"]}, "days": {"type": "boolean"}},
        "required": ["sky", "days"],
        "additionalProperties": False,
    }
    shaped = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hello"}],
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        n=3,
        temperature=1.5,
    )
    for choice in shaped.choices:
        jsonschema_rs.validate(schema, json.loads(choice.message.content or ""))
    called = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hello"}],
        tools=[{"type": "function", "function": {"name": "look", "parameters": schema}}],
        tool_choice="required",
        parallel_tool_calls=False,
    ).choices[0]
    assert called.finish_reason == "tool_calls"
    (call,) = called.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "look"
    jsonschema_rs.validate(schema, json.loads(call.function.arguments))


def test_ctrl_c_leaves_nothing_behind(model_dir: Path, tmp_path: Path) -> None:
    with Platform(model_dir, tmp_path) as platform:
        ask(platform, "Hello")
        pids = platform.pids()
        assert len(pids) >= 4
        assert platform.stop() == 0
    assert not (tmp_path / "run").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", platform.port), timeout=2)


def test_a_killed_supervisor_leaves_no_orphan(model_dir: Path, tmp_path: Path) -> None:
    with Platform(model_dir, tmp_path) as platform:
        pids = platform.pids()
        assert platform.stop(signal.SIGKILL) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_request_wakes_the_main_function_with_its_own_plan(
    model_dir: Path, tmp_path: Path
) -> None:
    with Platform(model_dir, tmp_path, "--main-retention", "0s") as platform:

        def main_state() -> str:
            states = [f["state"] for f in platform.status() if f["name"].endswith("-main")]
            return str(states[0])

        platform.wait_for(lambda: main_state() == "zero", within_s=120)
        text, cold = ask(platform, "Hello world")
        assert cold["cold_start"]["main_ms"] > 0
        assert cold["deployment_plan_id"] == cold["plan_id"]
        again, warm = ask(platform, "Hello world")
        assert again == text
        assert warm["cold_start"]["main_ms"] == 0
        assert warm["deployment_plan_id"] == cold["plan_id"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_trace_from_the_client_to_the_main_function(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with Platform(model_dir, tmp_path) as platform:
        ask(platform, "Hello world")
    collector.close()
    spans = [(service, span) for service, span in collector.spans if span.name != "plan"]
    (chat,) = [span for service, span in spans if span.name.startswith("text_completion ")]
    ours = [(service, span) for service, span in spans if span.trace_id == chat.trace_id]
    assert {service for service, _ in ours} == {"remoe-gateway", "remoe-planner", "remoe-main"}
    names = {span.name: span for _, span in ours}
    assert {"POST /v1/plan", "POST /v1/generate", "queue", "prefill", "decode"} <= set(names)
    generate = names["POST /v1/generate"]
    assert generate.parent_span_id == chat.span_id
    assert names["decode"].parent_span_id == generate.span_id
    calls = [span for _, span in ours if span.name == "experts"]
    assert {span.parent_span_id for span in calls} == {generate.span_id}
    (busy_s,) = (a.value.double_value for a in calls[0].attributes if a.key.endswith(".busy_s"))
    assert 0 < busy_s < (calls[0].end_time_unix_nano - calls[0].start_time_unix_nano) / 1e9
    attributes = {a.key: a.value for a in generate.attributes}
    assert attributes["remoe.remote.calls"].int_value == len(calls)
