"""Traces: passed on without an exporter, and made of every service's spans with one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from remoe.topology import Topology
from remoe.tracing import current_span, outgoing_headers, server_span
from tests.gateway.conftest import Stack
from tests.gateway.tiny_text import MODEL
from tests.otlp import Collector

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_client_s_trace_and_request_id_go_all_the_way(stack: Stack, http: httpx.Client) -> None:
    headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
    assert http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    for seen in (stack.planner.headers[0], stack.main.headers[0]):
        assert seen["traceparent"] == TRACEPARENT
        assert seen["x-request-id"] == "mine"


@pytest.mark.parametrize("bad", ["", "00-xyz-1-01", "00-" + "0" * 200, "a b"])
def test_a_damaged_traceparent_goes_nowhere(stack: Stack, http: httpx.Client, bad: str) -> None:
    headers = {"traceparent": bad}
    assert http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    assert "traceparent" not in stack.main.headers[0]


def test_nothing_is_imported_where_nothing_is_exported() -> None:
    code = (
        "import sys; from remoe.tracing import tracing\n"
        "with tracing('x'): assert 'opentelemetry' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_expert_function_knows_nothing_of_it() -> None:
    code = (
        "import sys, expert_fn.__main__\n"
        "assert not any(m.startswith(('opentelemetry', 'sqlalchemy', 'remoe.tracing')) "
        "for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outside_a_request_there_is_no_trace() -> None:
    assert outgoing_headers() == {}
    with server_span("GET", None, None) as span:
        assert current_span() is span
        assert outgoing_headers() == {}
    assert current_span() is not span


def test_a_gateway_s_spans(
    stack: Stack, topology: Topology, tmp_path: Path, collector: Collector
) -> None:
    import socket

    path = tmp_path / "topology.json"
    topology.save(path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "REMOE_TOPOLOGY": str(path),
        "REMOE_GATEWAY_AUTH": "off",
        "PORT": str(port),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
    }
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, "-m", "gateway"], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        try:
            limit = time.monotonic() + 30
            while True:
                try:
                    httpx.get(f"{url}/readyz")
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < limit
                    time.sleep(0.05)
            headers = {"traceparent": TRACEPARENT}
            reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers)
            assert reply.status_code == 200
            httpx.post(f"{url}/v1/chat/completions", json={}, headers=headers)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
    spans = [span for service, span in collector.spans if service == "remoe-gateway"]
    by_name = {span.name: span for span in spans}
    # The health check has left none.
    assert sorted(by_name) == ["POST", f"chat {MODEL}", "plan"]
    chat, plan, bad = by_name[f"chat {MODEL}"], by_name["plan"], by_name["POST"]
    assert {span.trace_id.hex() for span in by_name.values()} == {TRACE}
    assert chat.parent_span_id.hex() == "b7ad6b7169203331"
    assert plan.parent_span_id == chat.span_id
    attributes = {a.key: a.value for a in chat.attributes}
    assert attributes["gen_ai.operation.name"].string_value == "chat"
    assert attributes["gen_ai.response.id"].string_value == reply.json()["id"]
    assert attributes["gen_ai.usage.output_tokens"].int_value > 0
    assert attributes["remoe.plan_id"].string_value == reply.json()["x_remoe"]["plan_id"]
    assert attributes["remoe.cost_usd"].double_value == reply.json()["x_remoe"]["cost_usd"]
    failure = {a.key: a.value.string_value for a in bad.attributes}
    assert failure["error.type"] == "invalid_value"
    # What stands behind the gateway continues its spans.
    assert plan.span_id.hex() in stack.planner.headers[0]["traceparent"]
    assert chat.span_id.hex() in stack.main.headers[0]["traceparent"]
