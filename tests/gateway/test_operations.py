"""Models, health, metrics, request ids, log lines, and the program itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
from structlog.testing import capture_logs

from gateway.app import create_app
from gateway.config import GatewaySettings
from remoe.errors import CheckpointError
from remoe.generation import GenerateEvent, GenerateRequest
from remoe.topology import Topology
from tests.gateway.conftest import Stack, eventually
from tests.gateway.fakes import Gate
from tests.gateway.tiny_text import CONTEXT, MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


def test_models(stack: Stack, client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == (MODEL, "model", "remoe")
    assert listed.created > 1_700_000_000
    assert listed.model_extra == {"max_model_len": CONTEXT, "state": "zero"}
    # Its name has a slash.
    assert client.models.retrieve(MODEL) == listed


def test_health_touches_nothing_else(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    url = serve_gateway(main_url="http://127.0.0.1:9", planner_url="http://127.0.0.1:9")
    for path in ("/healthz", "/readyz", "/v1/models", "/", "/metrics", "/dashboard/state"):
        assert httpx.get(url + path).status_code == 200
    assert stack.main.requests == []


def test_request_ids(stack: Stack, http: httpx.Client) -> None:
    given = http.get("/healthz", headers={"x-request-id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    for bad in ("two words", "x" * 200, 'quote"'):
        made = http.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"]
        assert len(made) == 32
    # The main function's ids are unique even if the client's are not.
    for _ in range(2):
        http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "same"})
    first, second = stack.main.requests
    assert first.request_id != second.request_id


def test_metrics(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    url = serve_gateway()
    httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    httpx.post(f"{url}/v1/chat/completions", json={})
    httpx.get(f"{url}/v1/secret-path-of-a-client")
    eventually(lambda: 'status="404"' in httpx.get(f"{url}/metrics").text)
    eventually(lambda: "first_token_seconds_count 1.0" in httpx.get(f"{url}/metrics").text)
    reply = httpx.get(f"{url}/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = reply.text.splitlines()
    assert 'remoe_requests_total{route="/v1/chat/completions",status="200"} 1.0' in lines
    assert 'remoe_requests_total{route="/v1/chat/completions",status="400"} 1.0' in lines
    assert 'remoe_requests_total{route="other",status="404"} 1.0' in lines
    assert "remoe_time_to_first_token_seconds_count 1.0" in lines
    assert 'remoe_cold_start_seconds_sum{function="experts"} 0.125' in lines
    assert 'remoe_plans_total{outcome="planned"} 1.0' in lines
    assert any(line.startswith('remoe_cost_usd_total{part="remote"}') for line in lines)
    names = {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    assert all(name.startswith("remoe_") for name in names)


def test_one_log_line_for_a_request(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    url = serve_gateway()
    with capture_logs() as logs:
        httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers={"x-request-id": "it"})
        httpx.post(f"{url}/v1/chat/completions", json={}, headers={"x-request-id": "bad"})
        httpx.get(f"{url}/healthz", headers={"x-request-id": "check"})
        eventually(lambda: sum(line["event"] == "request" for line in logs) == 3)
    # The line is written after the reply, so their order is not fixed.
    lines = {line["request_id"]: line for line in logs if line["event"] == "request"}
    good, bad, health = (lines[name] for name in ("it", "bad", "check"))
    assert (good["request_id"], good["plan_id"], good["status"]) == ("it", "plan-1", 200)
    assert good["log_level"] == "info"
    assert good["cost_usd"] > 0
    assert (bad["request_id"], bad["status"], bad["error_code"]) == ("bad", 400, "invalid_value")
    assert health["log_level"] == "debug"


def test_unforeseen_failures_say_nothing(
    stack: Stack, serve_gateway: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("/srv/secret/path.py is broken")

    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        await begun.passed()
        yield GenerateEvent(finish="stop")

    url, begun = serve_gateway(), Gate()
    monkeypatch.setattr("gateway.generation.build_receipt", explode)
    with capture_logs() as logs:
        whole = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        stack.main.script = script
        body = {**CHAT, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            lines = (line for line in reply.iter_lines() if line)
            assert "assistant" in next(lines)
            begun.open()
            *_, last = lines
        eventually(lambda: sum(line["event"] == "request failed" for line in logs) == 2)
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "internal_error"
    assert whole.headers["x-request-id"]
    assert last.startswith('data: {"error":')
    assert "secret" not in whole.text + last


def test_the_schema_describes_bodies_and_errors(stack: Stack, http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    posted = schema["paths"]["/v1/chat/completions"]["post"]
    assert posted["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ChatRequest"
    }
    assert "max_completion_tokens" in schema["components"]["schemas"]["ChatRequest"]["properties"]
    text = http.get("/openapi.json").text
    assert "HTTPValidationError" not in text
    for name in set(text.split("#/components/schemas/")[1:]):
        assert name.split('"')[0] in schema["components"]["schemas"]


def test_a_model_folder_without_a_tokenizer_fails_before_serving(
    tmp_path: Path, topology: Topology
) -> None:
    settings = GatewaySettings.model_validate({"topology": tmp_path / "topology.json"})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        create_app(settings, msgspec.structs.replace(topology, model_dir=str(tmp_path)))


def test_the_program_serves_and_drains(tmp_path: Path, topology: Topology) -> None:
    path = tmp_path / "topology.json"
    topology.save(path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "REMOE_TOPOLOGY": str(path), "PORT": str(port)}
    environment["REMOE_GATEWAY_AUTH"] = "off"
    with subprocess.Popen(
        [sys.executable, "-m", "gateway"], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                limit = time.monotonic() + 30
                while True:
                    try:
                        assert client.get("/readyz").json() == {"status": "ready"}
                        break
                    except httpx.ConnectError:
                        assert process.poll() is None
                        assert time.monotonic() < limit
                        time.sleep(0.05)
                reply = client.post("/v1/chat/completions", json=CHAT)
                assert reply.status_code == 200
                assert "x-remoe-ready-for-ms" in reply.headers
        finally:
            process.send_signal(signal.SIGTERM)
            _, logs = process.communicate(timeout=20)
    assert process.returncode == 0, logs
    assert '"event": "request"' in logs


def test_bad_settings_name_the_variable(tmp_path: Path, topology: Topology) -> None:
    path = tmp_path / "topology.json"
    topology.save(path)
    finished = subprocess.run(
        [sys.executable, "-m", "gateway"],
        env={**os.environ, "REMOE_TOPOLOGY": str(path), "REMOE_GATEWAY_HEARTBEAT_S": "-1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode != 0
    assert "REMOE_GATEWAY_HEARTBEAT_S" in finished.stderr
