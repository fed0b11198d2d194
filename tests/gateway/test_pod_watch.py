"""The resident ledger on a cluster: pods as the Kubernetes API tells them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.pod_watch import SERVICE_LABEL, ApiServer, pods_say
from gateway.residency import ResidentMeter
from gateway.runtime_watch import RuntimeWatch
from remoe.topology import ExpertEndpoint, Topology

NAMESPACE = "ns"
SELECTOR = "app.kubernetes.io/part-of=remoe"


def pod(
    name: str, service: str, *, node: str = "n", ready: bool = True, phase: str = "Running"
) -> dict[str, Any]:
    limits = {"memory": "1000M"}
    return {
        "metadata": {
            "name": name,
            "uid": name,
            "labels": {SERVICE_LABEL: service},
            "creationTimestamp": "2026-11-23T12:00:00Z",
        },
        "spec": {
            "nodeName": node,
            "containers": [
                {"name": "user-container", "resources": {"limits": limits}},
                {"name": "queue-proxy", "resources": {}},
            ],
        },
        "status": {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


class Api:
    """Lists `pods`, then sends what is put into `changes`; None ends the watch."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.changes: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.asked: list[dict[str, str]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == "Bearer of-the-pod"
        assert request.query["labelSelector"] == SELECTOR
        self.asked.append(dict(request.query))
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": "7"}, "items": self.pods})
        response = web.StreamResponse()
        await response.prepare(request)
        while (change := await self.changes.get()) is not None:
            await response.write(msgspec.json.encode(change) + b"\n")
        return response


@pytest.fixture
def topology() -> Topology:
    host = f"http://{{}}.{NAMESPACE}.svc.cluster.local"
    return Topology(
        model="m",
        model_dir="/m",
        gateway_url=host.format("gateway"),
        planner_url=host.format("planner"),
        main_url=host.format("m-main"),
        main_memory_gb=1,
        experts=[
            ExpertEndpoint(
                name="m-experts",
                url=host.format("m-experts"),
                first_layer=0,
                last_layer=1,
                memory_gb=1,
            )
        ],
    )


def test_memory_of_pods_is_shared_as_they_come_and_go(tmp_path: Path, topology: Topology) -> None:
    (tmp_path / "token").write_text("of-the-pod\n", encoding="utf-8")
    now = 0.0
    meter = ResidentMeter(topology, clock=lambda: now)
    api = Api()
    api.pods = [
        pod("g", "gateway"),
        pod("m", "m-main"),
        pod("waits", "m-experts", node="", ready=False, phase="Pending"),
        pod("over", "m-experts", phase="Succeeded"),
    ]

    async def until(holds: tuple[float, float, float]) -> None:
        for _ in range(500):
            rate = meter._rate
            if (rate.main_gb_s, rate.experts_gb_s, rate.services_gb_s) == holds:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"still {meter._rate}, not {holds}")

    async def scenario() -> None:
        nonlocal now
        app = web.Application()
        app.router.add_get(f"/api/v1/namespaces/{NAMESPACE}/pods", api.answer)
        async with TestServer(app) as server:
            url = str(server.make_url("")).rstrip("/")
            here = ApiServer(url, NAMESPACE, tmp_path / "token", None)
            watch = RuntimeWatch(pods_say(here, model="m", url="http://gateway"), meter)
            watch.start()
            await until((1, 0, 1))
            stay = meter.enter()
            now = 3.0
            woken = pod("waits", "m-experts", ready=False)
            api.changes.put_nowait({"type": "MODIFIED", "object": woken})
            await until((1, 1, 1))
            assert meter._rate.starting_gb_s == 1
            now = 5.0
            api.changes.put_nowait({"type": "BOOKMARK", "object": {"kind": "Pod"}})
            api.changes.put_nowait({"type": "DELETED", "object": woken})
            await until((1, 0, 1))
            stay.leave()
            share = stay.share()
            assert share is not None
            assert (share.main_gb_s, share.experts_gb_s, share.services_gb_s) == (5, 2, 5)
            # A version too old: everything is listed again.
            api.pods = [pod("g", "gateway")]
            api.changes.put_nowait({"type": "ERROR", "object": {"code": 410}})
            await until((0, 0, 1))
            assert watch.latest is not None
            assert [one.name for one in watch.latest.functions] == ["gateway"]
            api.changes.put_nowait(None)
            await watch.close()

    asyncio.run(scenario())
    watches = [query for query in api.asked if "watch" in query]
    assert watches[0]["resourceVersion"] == "7"


def test_only_a_pod_with_an_account_has_an_api_server(tmp_path: Path) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert ApiServer.of_this_pod(environment, tmp_path) is None
    for name, text in (("token", "t"), ("namespace", "ns\n"), ("ca.crt", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert ApiServer.of_this_pod({}, tmp_path) is None
    server = ApiServer.of_this_pod(environment, tmp_path)
    assert server is not None
    assert (server.url, server.namespace) == ("https://[fd00::1]:6443", "ns")
