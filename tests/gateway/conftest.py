"""A gateway on a real port, with a fake main function and a fake planner on theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
import structlog
import uvicorn
from starlette.types import ASGIApp
from tokenizers import Tokenizer

from gateway.app import create_app
from gateway.config import GatewaySettings
from remoe.topology import ExpertEndpoint, Topology
from tests.gateway.fakes import FakeMain, FakePlanner
from tests.gateway.tiny_text import MODEL, write_model


@dataclass(frozen=True, slots=True)
class Stack:
    """One running gateway and what is behind it."""

    url: str
    main: FakeMain
    planner: FakePlanner
    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@contextmanager
def serve(app: ASGIApp) -> Iterator[str]:
    """Serve an app on a free loopback port, in a thread, until the block ends."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, access_log=False, ws="none", loop="asyncio"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < limit, "the server did not start in time"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="package", autouse=True)
def _silent_logs() -> Iterator[None]:
    """Servers log from their own threads, past pytest's capture."""
    structlog.configure(processors=[], logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@dataclass(frozen=True, slots=True)
class _Upstreams:
    main: FakeMain
    planner: FakePlanner
    topology: Topology


@pytest.fixture(scope="session")
def _upstreams(model_dir: Path, tokenizer: Tokenizer) -> Iterator[_Upstreams]:
    main, planner = FakeMain(tokenizer), FakePlanner()
    with serve(main.app) as main_url, serve(planner.app) as planner_url:
        expert = ExpertEndpoint(
            name="experts-0", url=planner_url, first_layer=0, last_layer=0, memory_gb=0.1
        )
        yield _Upstreams(
            main,
            planner,
            Topology(
                model=MODEL,
                model_dir=str(model_dir),
                gateway_url="http://127.0.0.1:1",
                planner_url=planner_url,
                main_url=main_url,
                main_memory_gb=1.0,
                experts=[expert],
            ),
        )


@pytest.fixture
def topology(stack: Stack, _upstreams: _Upstreams) -> Topology:
    return _upstreams.topology


@pytest.fixture
def main_url(topology: Topology) -> str:
    return topology.main_url


def _settings(topology: Topology, folder: Path, **values: object) -> GatewaySettings:
    path = folder / "topology.json"
    topology.save(path)
    return GatewaySettings.model_validate({"topology": path, **values})


@pytest.fixture(scope="session")
def _patient_url(_upstreams: _Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = _settings(_upstreams.topology, tmp_path_factory.mktemp("topology"), heartbeat_s=5)
    with serve(create_app(settings, _upstreams.topology)) as url:
        yield url


@pytest.fixture
def stack(_upstreams: _Upstreams, _patient_url: str, tokenizer: Tokenizer) -> Stack:
    """The shared gateway, with fakes that remember nothing."""
    _upstreams.main.reset()
    _upstreams.planner.reset()
    return Stack(_patient_url, _upstreams.main, _upstreams.planner, tokenizer)


@pytest.fixture
def serve_gateway(topology: Topology, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serve one more gateway with settings, or addresses, of the test's own."""
    with ExitStack() as exits:

        def start(
            *, main_url: str | None = None, planner_url: str | None = None, **values: object
        ) -> str:
            changed = msgspec.structs.replace(
                topology,
                planner_url=planner_url or topology.planner_url,
                main_url=main_url or topology.main_url,
            )
            app = create_app(_settings(changed, tmp_path, **values), changed)
            return exits.enter_context(serve(app))

        yield start


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai_client(stack.url) as client:
        yield client


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=20, trust_env=False) as client:
        yield client


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what a server does after its reply, at most 10 s."""
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.005)
