"""A deployment of toy services, and a supervisor for it that tests can hold in their hand."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from knative.local.options import RuntimeOptions
from knative.local.run_dir import RunDir
from knative.local.supervisor import Supervisor
from knative.policy import AUTOSCALING
from knative.spec import FunctionSpec
from remoe.runtime_status import FunctionStatus
from remoe.topology import Topology, socket_path

ROOT = Path(__file__).parents[2]

# The pace of tests: seconds where a cluster has minutes.
FAST = RuntimeOptions(
    tick_s=0.1,
    sample_s=0.05,
    window_s=0.4,
    backoff_first_s=0.1,
    backoff_most_s=0.3,
    stop_grace_s=5.0,
)


def toy_spec(
    name: str = "toy",
    *,
    env: Mapping[str, str] | None = None,
    memory_mib: int = 512,
    container_concurrency: int = 0,
    local_socket: bool = False,
    **scaling: str,
) -> FunctionSpec:
    """A toy function; scaling keys are Knative's, with underscores."""
    scaling = {"initial_scale": "0", **scaling}
    return FunctionSpec(
        name=name,
        module="tests.knative.toy_service",
        holds="a toy",
        env={"PYTHONPATH": str(ROOT), "REMOE_NOTIFY_INTERVAL_S": "0.05", **(env or {})},
        timeout_s=10,
        memory_mib=memory_mib,
        container_concurrency=container_concurrency,
        local_socket=local_socket,
        annotations={AUTOSCALING + key.replace("_", "-"): value for key, value in scaling.items()},
    )


@dataclass(frozen=True)
class ToyDeployment:
    """The first function is the gateway; port 0 is any."""

    functions: tuple[FunctionSpec, ...]
    port: int = 0
    model: str = "toy"
    host: str = "127.0.0.1"
    scheme: str = "http"

    @property
    def gateway(self) -> FunctionSpec:
        return self.functions[0]

    def topology(self, urls: Mapping[str, str]) -> Topology:
        url = urls[self.gateway.name]
        return Topology(
            model=self.model,
            model_dir="/",
            gateway_url=url,
            planner_url=url,
            main_url=url,
            main_memory_gb=1.0,
            experts=[],
        )


def supervise(
    home: Path, *functions: FunctionSpec, options: RuntimeOptions = FAST, port: int = 0
) -> Supervisor:
    return Supervisor(
        ToyDeployment(functions or (toy_spec(),), port), RunDir(home), options=options
    )


def status_of(supervisor: Supervisor, name: str = "toy") -> FunctionStatus:
    return supervisor.functions[name].status()


async def until(condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Wait for something that real processes bring about; fails after `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # what is awaited is in other processes
            await asyncio.sleep(0.01)


async def get(url: str, *, timeout_s: float = 20.0) -> httpx.Response:
    """One request on a connection of its own."""
    async with httpx.AsyncClient(timeout=timeout_s, trust_env=False) as client:
        return await client.get(url)


async def get_by_socket(url: str, path: str) -> httpx.Response:
    """The same where the URL is a socket's on this machine."""
    transport = httpx.AsyncHTTPTransport(uds=socket_path(url))
    async with httpx.AsyncClient(transport=transport, timeout=20, trust_env=False) as client:
        return await client.get(f"http://localhost{path}")


async def run_until_killed(home: Path) -> None:
    async with supervise(home, toy_spec(min_scale="1", initial_scale="1")) as supervisor:
        await supervisor.wait_ready("toy")
        sys.stdout.write(f"{supervisor.status().functions[0].replicas[0].pid}\n")
        sys.stdout.flush()
        await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(run_until_killed(Path(sys.argv[1])))
