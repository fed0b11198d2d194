"""What the gateway does differently where MoEless' policies place the experts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import httpx
import pytest

from gateway.residency import ResidentMeter
from gateway.runtime_watch import RuntimeWatch
from remoe.moeless.function_balance import Policy
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
    assert (stack.planner.requests[-1].streams is not None) == sent


def test_in_joint_mode_the_planner_chooses_for_each_prompt(
    stack: Stack, serve_gateway: Callable[..., str]
) -> None:
    url = serve_gateway(policy="joint")
    chat = {**CHAT, "model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"]}
    choices: tuple[tuple[Policy, bool], ...] = (
        ("joint", True),
        ("moeless", False),
        ("remoe", False),
    )
    for chosen, seeded in choices:
        stack.planner.policy = chosen
        assert httpx.post(f"{url}/v1/chat/completions", json=chat).status_code == 200
        assert stack.planner.requests[-1].streams == 1
        asked = stack.main.requests[-1]
        assert (asked.policy, asked.profile is not None) == (chosen, seeded)


def test_the_watch_knows_since_when_a_function_serves(topology: Topology) -> None:
    now = 100.0
    watch = RuntimeWatch(None, ResidentMeter(topology), clock=lambda: now)
    url = topology.main_url

    def says(ready: int) -> None:
        function = SimpleNamespace(url=url, ready=ready, memory_limit_bytes=0, replicas=[])
        watch.take(SimpleNamespace(functions=[function]))  # type: ignore[arg-type]

    assert not watch.is_ready(url)
    assert watch.ready_for_s(url) == 0
    says(ready=1)
    now += 5
    says(ready=2)
    now += 1
    assert watch.is_ready(url)
    assert not watch.is_ready("http://127.0.0.1:1")
    assert watch.ready_for_s(url) == 6
    says(ready=0)
    says(ready=1)
    now += 2
    assert watch.ready_for_s(url) == 2
    watch.take(None)
    assert watch.ready_for_s(url) == 0
