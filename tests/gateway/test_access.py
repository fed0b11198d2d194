"""Keys, limits and budgets, through the openai client."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from gateway.app import create_app
from gateway.config import GatewaySettings
from gateway.key_ring import Caller, KeyRing
from gateway.limits import TokenBucket, reset_text
from remoe.accounts.database import open_database
from remoe.accounts.keys import ApiKey, create_key, revoke_key
from remoe.errors import QuotaError, RateLimitError, SettingsError, TokenRateLimitError
from remoe.topology import Topology
from tests.gateway.conftest import Stack, eventually
from tests.gateway.tiny_text import MODEL

_CHAT: list[object] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def books(ledger: str) -> Iterator[Engine]:
    engine = open_database(ledger)
    yield engine
    engine.dispose()


def ask(url: str, key: str) -> httpx2.Response:
    """A chat as the client sends it; its errors are the client's."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20) as client:
        return client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=_CHAT,  # type: ignore[arg-type]
        ).http_response


def test_who_has_no_key_is_refused(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    url = serve_gateway(ledger=ledger, auth="required")
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(url, "sk-wrong")
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert "Authorization" in httpx.get(f"{url}/v1/models").json()["error"]["message"]
    for path in ("/healthz", "/readyz", "/metrics", "/"):
        assert httpx.get(url + path).status_code == 200
    # A key made while the gateway runs is known soon, and a revoked one forgotten.
    key, secret = create_key(books, "ada")
    eventually(lambda: _allowed(url, secret))
    revoke_key(books, key.id)
    eventually(lambda: not _allowed(url, secret))
    assert len(stack.main.requests) == 0


def _allowed(url: str, secret: str) -> bool:
    reply = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {secret}"})
    return reply.status_code == 200


def test_without_required_keys_any_text_is_let_in_and_a_key_is_honoured(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    url = serve_gateway(ledger=ledger)
    _, secret = create_key(books, "ada", requests_per_minute=1)
    assert ask(url, "none").status_code == 200
    assert ask(url, secret).status_code == 200
    with pytest.raises(openai.RateLimitError):
        ask(url, secret)
    assert ask(url, "none").status_code == 200


def test_a_model_that_a_key_may_not_use(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    _, secret = create_key(books, "narrow", models=["another"])
    url = serve_gateway(ledger=ledger, auth="required")
    with pytest.raises(openai.PermissionDeniedError) as caught:
        ask(url, secret)
    assert (caught.value.code, caught.value.param) == ("model_not_allowed", "model")
    headers = {"authorization": f"Bearer {secret}"}
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"] == []
    assert httpx.get(f"{url}/v1/models/{MODEL}", headers=headers).status_code == 403
    assert stack.main.requests == []


def test_limits_are_told_in_openai_s_headers(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    _, secret = create_key(books, "ada", requests_per_minute=2, tokens_per_minute=1000)
    url = serve_gateway(ledger=ledger, auth="required")
    headers = ask(url, secret).headers
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    ask(url, secret)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(url, secret)
    assert (caught.value.type, caught.value.code) == ("requests", "rate_limit_exceeded")
    assert 0 < int(caught.value.response.headers["retry-after-ms"]) <= 30_000


def test_tokens_are_charged_when_they_are_known(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    _, secret = create_key(books, "ada", tokens_per_minute=5)
    url = serve_gateway(ledger=ledger, auth="required")
    ask(url, secret)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(url, secret)
    assert caught.value.type == "tokens"


def test_a_spent_budget_ends_the_day(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    _, secret = create_key(books, "ada", nano_usd_per_day=1)
    url = serve_gateway(ledger=ledger, auth="required")
    assert ask(url, secret).status_code == 200
    with pytest.raises(openai.RateLimitError) as caught:
        ask(url, secret)
    assert (caught.value.type, caught.value.code) == ("insufficient_quota", "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    # Another gateway on the same ledger knows of it too, and so does this one started again.
    again = serve_gateway(ledger=ledger, auth="required")
    with pytest.raises(openai.RateLimitError):
        ask(again, secret)


def test_a_public_address_needs_keys(topology: Topology, tmp_path: Path, ledger: str) -> None:
    path = tmp_path / "topology.json"
    topology.save(path)

    def create(**values: object) -> None:
        settings = GatewaySettings.model_validate({"topology": path, **values})
        create_app(settings, topology, public=True)

    with pytest.raises(SettingsError, match="there are no keys: set REMOE_GATEWAY_LEDGER"):
        create()
    with pytest.raises(SettingsError, match="no key yet: make one with `remoe key create"):
        create(ledger=ledger)
    create(auth="off")
    engine = open_database(ledger)
    create_key(engine, "ada")
    engine.dispose()
    create(ledger=ledger)


def test_pages_of_other_origins(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    preflight = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    closed = httpx.options(f"{serve_gateway()}/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in closed.headers
    url = serve_gateway(cors_origins="https://app.example, https://b.example")
    opened = httpx.options(f"{url}/v1/chat/completions", headers=preflight)
    assert opened.headers["access-control-allow-origin"] == "https://app.example"
    reply = httpx.get(f"{url}/v1/models", headers={"origin": "https://app.example"})
    assert "x-request-id" in reply.headers["access-control-expose-headers"]


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=50),
)
def test_a_bucket_never_gives_more_than_its_rate(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    clock = _Clock()
    bucket = TokenBucket(per_minute, clock)
    taken = 0
    for pause_s, amount in steps:
        clock.now += pause_s
        if bucket.wait_s(amount) == 0:
            bucket.charge(amount)
            taken += amount
        else:
            clock.now += bucket.wait_s(min(amount, per_minute)) + 1e-6
            assert bucket.wait_s(min(amount, per_minute)) == 0
        assert taken <= per_minute + clock.now * per_minute / 60 + 1e-6
        assert 0 <= bucket.remaining <= per_minute
        assert bucket.reset_s >= -1e-9


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.02, "20ms"), (0, "0ms"), (1.5, "1.5s"), (59, "59s"), (360, "6m0s")]
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert reset_text(seconds) == text


def test_a_caller_s_day() -> None:
    key = ApiKey(
        id="k", name="ada", sha256="", created_at_us=0, nano_usd_per_day=100, tokens_per_minute=60
    )
    clock = _Clock()
    caller = Caller(key, clock)
    noon = 1_764_000_000.0
    caller.admit(noon)
    caller.used(tokens=90, nano_usd=100, day="2025-11-24")
    with pytest.raises(QuotaError, match=r"\$1e-07 for today.*2025-11-25T00:00:00Z"):
        caller.admit(noon)
    with pytest.raises(TokenRateLimitError):
        caller.admit(noon + 86_400)
    clock.now = 31.0
    caller.admit(noon + 86_400)


def test_requests_are_only_counted_when_they_are_let_in() -> None:
    clock = _Clock()
    caller = Caller(
        ApiKey(id="k", name="a", sha256="", created_at_us=0, requests_per_minute=1), clock
    )
    caller.admit(0)
    for _ in range(5):
        with pytest.raises(RateLimitError):
            caller.admit(0)
    clock.now = 60.0
    caller.admit(0)


async def _found(ring: KeyRing, secret: str) -> bool:
    return await ring.find(secret) is not None


def test_strangers_cannot_make_the_gateway_read_without_end(books: Engine) -> None:
    import asyncio

    clock = _Clock()
    reads = 0

    class CountingRing(KeyRing):
        def _read(self, day: str | None) -> tuple[list[ApiKey], dict[str, int] | None]:
            nonlocal reads
            reads += 1
            return super()._read(day)

    async def run() -> None:
        ring = CountingRing(books, clock=clock)
        for number in range(100):
            clock.now += 0.01
            assert not await _found(ring, f"guess-{number}")

    asyncio.run(run())
    assert reads <= 5


def test_https(topology: Topology, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    cert, key, path = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "topology.json"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    topology.save(path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "REMOE_TOPOLOGY": str(path),
        "PORT": str(port),
        "REMOE_GATEWAY_AUTH": "off",
        "REMOE_GATEWAY_TLS_CERT": str(cert),
        "REMOE_GATEWAY_TLS_KEY": str(key),
    }
    trusted = ssl.create_default_context(cafile=str(cert))
    reply: httpx.Response | None = None
    with subprocess.Popen(
        [sys.executable, "-m", "gateway"], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        try:
            limit = time.monotonic() + 30
            while reply is None:
                try:
                    reply = httpx.get(f"https://127.0.0.1:{port}/readyz", verify=trusted)
                except httpx.ConnectError:
                    assert process.poll() is None
                    assert time.monotonic() < limit
                    time.sleep(0.05)
            assert reply.json() == {"status": "ready"}
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/readyz")
        finally:
            process.terminate()
            process.wait(20)


def test_half_of_tls_is_refused_before_any_port(topology: Topology, tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    topology.save(path)
    finished = subprocess.run(
        [sys.executable, "-m", "gateway"],
        env={**os.environ, "REMOE_TOPOLOGY": str(path), "REMOE_GATEWAY_TLS_CERT": "cert.pem"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode != 0
    assert "both REMOE_GATEWAY_TLS_CERT and REMOE_GATEWAY_TLS_KEY" in finished.stderr
