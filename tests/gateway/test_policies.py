"""What the gateway does differently where MoEless' policies place the experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from gateway.residency import ResidentMeter
from gateway.runtime_watch import RuntimeWatch, supervisor_says
from remoe.topology import Topology
from tests.gateway.conftest import Stack

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.mark.parametrize(
    ("policy", "sent"), [("remoe", False), ("moeless", False), ("joint", True)]
)
def test_the_prediction_travels_with_the_request_in_joint_mode_alone(
    stack: Stack, serve_gateway: Callable[..., str], *, policy: str, sent: bool
) -> None:
    url = serve_gateway(policy=policy)
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    reply = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "model": model})
    assert reply.status_code == 200
    assert (stack.main.requests[-1].profile is not None) == sent


def test_the_watch_knows_whether_a_function_serves(topology: Topology) -> None:
    watch = RuntimeWatch(supervisor_says(Path("/nowhere")), ResidentMeter(topology))
    assert not watch.is_ready(topology.main_url)
    functions = [SimpleNamespace(url=topology.main_url, ready=1)]
    watch.latest = SimpleNamespace(functions=functions)  # type: ignore[assignment]
    assert watch.is_ready(topology.main_url)
    assert not watch.is_ready("http://127.0.0.1:1")
