"""What becomes of a main function that refuses, is gone, late, or breaks off."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import aiohttp
import httpx
import msgspec
import openai
import pytest
from starlette.responses import PlainTextResponse, Response

from gateway.background import Background
from gateway.main_client import GenerationStream, LostMainFunctionError
from gateway.outbox import Outbox, UndeliverableError
from gateway.receipt import WARM
from gateway.upstream import DEAD_AFTER_S, open_upstream
from remoe.errors import ContextLengthError, ExpertUnavailableError, QueueFullError, RemoeError
from remoe.generation import GenerateEvent, GenerateRequest
from remoe.ledger import Ledger
from tests.gateway.conftest import Stack, openai_client
from tests.gateway.fakes import Gate, stats
from tests.gateway.tiny_text import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
LEAK = "/srv/weights/secret.safetensors on 10.1.2.3"


def failure(error: RemoeError) -> Response:
    return Response(msgspec.json.encode(error.envelope()), status_code=error.status)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry_after"),
    [
        (PlainTextResponse(LEAK, status_code=500), 500, "internal_error", None),
        (PlainTextResponse(LEAK, status_code=502), 503, "model_loading", "5"),
        (PlainTextResponse("pending request queue full", 503), 503, "model_loading", "5"),
        (PlainTextResponse(LEAK, 503, {"retry-after": "9"}), 503, "model_loading", "9"),
        (PlainTextResponse(LEAK, 503, {"retry-after": "9000"}), 503, "model_loading", "120"),
        (PlainTextResponse("activator request timeout", 504), 504, "upstream_timeout", "10"),
        (PlainTextResponse(LEAK, 429, {"retry-after": "7"}), 429, "queue_full", "7"),
        (failure(ContextLengthError(LEAK)), 400, "context_length_exceeded", None),
        (failure(ExpertUnavailableError(LEAK)), 503, "expert_unavailable", "5"),
        (PlainTextResponse(LEAK, status_code=422), 500, "internal_error", None),
    ],
)
def test_refusals_are_translated(
    stack: Stack,
    http: httpx.Client,
    stream: bool,
    refusal: Response,
    status: int,
    code: str,
    retry_after: str | None,
) -> None:
    stack.main.refusal = refusal
    reply = http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.headers.get("retry-after") == retry_after
    should = {400: None, 500: "false"}.get(status, "true")
    assert reply.headers.get("x-should-retry") == should
    assert "secret" not in reply.text


def test_a_full_queue_says_how_long_an_answer_takes(
    stack: Stack, serve_gateway: Callable[..., str]
) -> None:
    async def slow(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        await asyncio.sleep(2.2)
        yield GenerateEvent(finish="stop")

    url = serve_gateway()
    stack.main.refusal = failure(QueueFullError(LEAK))
    reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
    stack.main.refusal = None
    stack.main.script = slow
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=20).status_code == 200
    stack.main.refusal = failure(QueueFullError(LEAK))
    reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert 2150 <= int(reply.headers["retry-after-ms"]) < 4000
    assert "secret" not in reply.text


def test_the_openai_client_retries_a_starting_model(stack: Stack) -> None:
    stack.main.refusal = PlainTextResponse("x", 503, {"retry-after": "0"})
    with (
        openai_client(stack.url).with_options(max_retries=1) as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert len(stack.main.requests) == 2


def test_a_main_function_that_is_gone(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    url = serve_gateway(main_url="http://127.0.0.1:9")
    reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_loading")
    assert reply.headers["retry-after"] == "5"
    assert "127.0.0.1" not in reply.text


def test_a_main_function_that_never_starts(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    stack.main.before_headers = gate = Gate()
    reply = httpx.post(
        f"{serve_gateway(cold_start_timeout_s=0.2)}/v1/chat/completions", json=CHAT, timeout=20
    )
    gate.open()
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "upstream_timeout")
    assert "0.2 s" in reply.json()["error"]["message"]


def test_a_generation_that_stalls(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        await asyncio.Event().wait()

    stack.main.script = script
    reply = httpx.post(
        f"{serve_gateway(stall_timeout_s=0.2)}/v1/chat/completions", json=CHAT, timeout=20
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "upstream_timeout")
    stack.main.cancelled.wait()


def test_reports_show_that_a_silent_main_function_is_alive(
    stack: Stack, serve_gateway: Callable[..., str]
) -> None:
    silences: list[float] = [10.0, 0.5]

    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(ledger=Ledger())
        pause_s = silences.pop(0)
        for _ in range(4):
            await asyncio.sleep(pause_s)
            yield GenerateEvent(ledger=Ledger())
        yield GenerateEvent(tokens=stack.encode("Paris"))
        yield GenerateEvent(finish="stop", stats=stats(request, 1))

    stack.main.script = script
    url = serve_gateway(silence_timeout_s=1.1)
    # The first one says nothing more, as when its machine is gone; the second is slow.
    reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=20)
    assert reply.json()["choices"][0]["message"]["content"] == "Paris"
    assert silences == []
    stack.main.cancelled.wait()


class Content:
    """A response's body of one line, which notes what it is to fail with."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.left = [msgspec.json.encode(GenerateEvent(tokens=[1])) + b"\n"]

    async def readany(self) -> bytes:
        return self.left.pop() if self.left else await asyncio.get_running_loop().create_future()

    def set_exception(self, error: BaseException) -> None:
        self.errors.append(error)


def test_a_slow_client_does_not_make_a_main_function_silent() -> None:
    async def read() -> None:
        content = Content()
        stream = GenerationStream(
            cast(aiohttp.ClientResponse, SimpleNamespace(content=content)),
            cold_start=WARM,
            silence_timeout_s=60,
            stall_timeout_s=60,
        )
        await stream.read()
        # Nobody asks for the next events: the client has not taken these yet.
        stream._give_up(stream._silent)
        assert content.errors == []
        waiting = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        stream._give_up(stream._silent)
        assert [type(error) for error in content.errors] == [LostMainFunctionError]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        stream.close()

    asyncio.run(read())


@pytest.mark.parametrize("size_bytes", [1, 1_000_000])
def test_a_request_is_on_its_way_when_it_is_made(size_bytes: int) -> None:
    """A large one too, that has to wait for its reader in the middle."""
    sent = bytes(range(256)) * (size_bytes // 256) + b"x" * (size_bytes % 256)
    got: list[bytes] = []
    steps: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            got.append(await reader.readexactly(size_bytes))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def ask(http: aiohttp.ClientSession, url: str) -> int:
        async with http.post(url, data=sent) as response:
            return response.status

    async def both() -> int:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, open_upstream() as http:
            await ask(http, url)  # from now on there is a connection
            transport_of(http, steps)
            asking = asyncio.create_task(ask(http, url))
            asyncio.get_running_loop().call_soon(steps.append, "the next in turn")
            return await asking

    assert asyncio.run(both()) == 200
    assert got == [sent, sent]
    assert steps == ["written", "the next in turn"]


def transport_of(http: aiohttp.ClientSession, steps: list[str]) -> None:
    """Note when the pool's one connection is first written to."""
    assert http.connector is not None
    ((protocol, _),) = next(iter(http.connector._conns.values()))
    assert protocol.transport is not None
    transport: asyncio.Transport = protocol.transport
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    class Noting:
        def write(self, data: bytes) -> None:
            if not steps:
                steps.append("written")
            transport.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(transport, name)

    protocol.transport = cast(asyncio.Transport, Noting())


@pytest.mark.parametrize("fresh", [False, True])
def test_connections_notice_a_peer_that_is_gone(fresh: bool) -> None:
    async def begin(listener: socket.socket) -> socket.socket:
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(listener)
        await loop.sock_sendall(connection, b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        return connection

    async def options(listener: socket.socket) -> list[int]:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        peer = asyncio.create_task(begin(listener))
        async with open_upstream(fresh=fresh) as http, http.get(url) as response:
            with await peer:
                return _options(response)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        assert asyncio.run(options(listener)) == [1, DEAD_AFTER_S * 1000]


def _options(response: aiohttp.ClientResponse) -> list[int]:
    assert response.connection is not None
    assert response.connection.transport is not None
    made = response.connection.transport.get_extra_info("socket")
    return [
        made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    ]


@contextmanager
def dying_then_forwarding(target: str) -> Iterator[tuple[str, list[int]]]:
    """A server whose first connection dies unanswered, as a killed replica's does."""
    host, port = target.removeprefix("http://").split(":")
    accepted: list[int] = []
    ready, stop = threading.Event(), asyncio.Event()
    address: list[str] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(1)
        try:
            if len(accepted) == 1:
                await reader.read(65536)
                return
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(pump(reader, far_writer))
                    group.create_task(pump(far_reader, writer))
            finally:
                far_writer.close()
        finally:
            writer.close()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        address.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        ready.set()
        async with server:
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield address[0], accepted
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)


def test_a_replica_that_dies_before_it_answers_is_asked_again(
    stack: Stack, main_url: str, serve_gateway: Callable[..., str]
) -> None:
    stack.main.say("Paris")
    with dying_then_forwarding(main_url) as (url, accepted):
        gateway = serve_gateway(main_url=url)
        reply = httpx.post(f"{gateway}/v1/chat/completions", json=CHAT, timeout=20)
    assert reply.json()["choices"][0]["message"]["content"] == "Paris"
    assert len(accepted) == 2


def test_an_outbox_sends_again_in_order_and_gives_up_the_oldest() -> None:
    async def run() -> tuple[list[int], int]:
        delivered: list[int] = []
        failures = [OSError("down"), TimeoutError(), UndeliverableError("no"), None]

        async def deliver(message: int) -> None:
            failure = failures.pop(0) if failures else None
            if failure is not None:
                raise failure
            delivered.append(message)

        outbox = Outbox(deliver, name="test", limit=3, first_pause_s=0.001, longest_pause_s=0.001)
        for message in range(5):
            outbox.put(message)
        await outbox.close()
        return delivered, len(outbox)

    # 0 is tried three times and refused for good; 1 and 2 had to make room.
    assert asyncio.run(run()) == ([3, 4], 0)


def test_an_outbox_is_not_waited_for() -> None:
    async def run() -> int:
        async def deliver(message: int) -> None:
            raise OSError("down")

        outbox = Outbox(deliver, name="test")
        outbox.put(1)
        await outbox.close(grace_s=0.01)
        return len(outbox)

    assert asyncio.run(run()) == 1


def test_observations_wait_for_a_planner_that_cannot_take_them(
    stack: Stack, serve_gateway: Callable[..., str]
) -> None:
    stack.planner.refused_observations = 2
    tokens = stack.encode("observed twice")
    with openai_client(serve_gateway()) as client:
        client.completions.create(model=MODEL, prompt=tokens, max_tokens=2)
    (observation,) = stack.planner.wait_for_observations(1, tokens)
    assert observation.prompt_tokens == tokens
    assert stack.planner.refused_observations == 0


def test_background_jobs_are_bounded_and_end() -> None:
    async def run() -> list[bool]:
        background = Background(limit=1)
        never = asyncio.Event()

        async def wait() -> None:
            await never.wait()

        started = [background.start(wait()), background.start(wait())]
        await asyncio.sleep(0)
        await background.close(grace_s=0.01)
        return started

    assert asyncio.run(run()) == [True, False]
