"""Servers to load: one that computes nothing, and one that refuses what it is told to refuse."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loadgen.null_server import NullServer

__all__ = ["Picky", "null_server"]


@contextmanager
def null_server(*, ttft_s: float = 0.0, itl_s: float = 0.0) -> Iterator[str]:
    """The base URL of a null server in a thread."""
    started = threading.Event()
    urls: list[str] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        listening = await NullServer(ttft_s=ttft_s, itl_s=itl_s).start()
        urls.append(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1")
        loops.append(asyncio.get_running_loop())
        stopping.append(asyncio.Event())
        started.set()
        await stopping[0].wait()
        listening.close()

    stopping: list[asyncio.Event] = []
    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(10), "the null server did not start"
    try:
        yield urls[0]
    finally:
        loops[0].call_soon_threadsafe(stopping[0].set)
        thread.join(10)


class Picky:
    """Refuses requests with certain fields, as OpenAI words it; then answers with some words."""

    def __init__(self, *refused: str, usage: bool = True, status: int = 200) -> None:
        self.refused = set(refused)
        self.usage = usage
        self.status = status
        self.bodies: list[dict[str, object]] = []
        self.ends_early = False
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "picky"}]})

    async def _chat(self, request: Request) -> Response:
        body: dict[str, object] = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return JSONResponse({"error": {"message": "no", "code": "busy"}}, self.status)
        for name in body:
            if name in self.refused:
                hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                message = f"Unrecognized request argument supplied: {name}.{hint}"
                return JSONResponse({"error": {"message": message, "code": None}}, 400)
        return StreamingResponse(self._words(body), media_type="text/event-stream")

    async def _words(self, body: dict[str, object]) -> AsyncIterator[bytes]:
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 3
        assert isinstance(wanted, int)
        yield b": a comment\n\n"
        for _ in range(wanted):
            yield _event({"choices": [{"index": 0, "delta": {"content": "word "}}]})
        if self.ends_early:
            return
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.usage and "stream_options" in body:
            messages = body["messages"]
            assert isinstance(messages, list)
            tokens = 10 + len(messages[0]["content"]) // 4
            usage = {"prompt_tokens": tokens, "completion_tokens": wanted}
            yield _event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def _event(payload: object) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"
