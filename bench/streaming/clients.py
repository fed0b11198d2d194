"""Clients that read streams with as little work as can be, and note when each token came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import uvloop

from bench.streaming.upstream import TEXT

PROMPT = "The capital of France"
_MARK = TEXT.encode()


@dataclass
class Stream:
    """What a client saw of one answer; times are of the clock all processes share."""

    id: str = ""
    asked: float = 0.0
    first_byte: float = 0.0
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0


class Client(asyncio.Protocol):
    """One kept-alive connection."""

    transport: asyncio.WriteTransport
    stream: Stream
    ended: asyncio.Future[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's has no such base

    async def ask(self, model: str, tokens: int) -> Stream:
        """One streamed chat completion."""
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": tokens,
            "stream": True,
        }
        body = json.dumps(asked).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer sk-x\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.ended = asyncio.get_running_loop().create_future()
        self.tail = b""
        self.stream = Stream(asked=time.perf_counter())
        self.transport.write(head.encode() + body)
        await self.ended
        assert self.stream.tokens == tokens, (self.stream.tokens, tokens)
        return self.stream

    def data_received(self, data: bytes) -> None:
        now, stream = time.perf_counter(), self.stream
        if not stream.first_byte:
            assert data.startswith(b"HTTP/1.1 200"), data[:500]
            stream.first_byte = now
        if not stream.id and (at := data.find(b'"id":')) >= 0:
            stream.id = data[at + 5 :].split(b'"')[1].decode()
        # One mark a token, whatever order a server gives its keys; a mark may be cut in two.
        count = (self.tail + data).count(_MARK)
        self.tail = data[1 - len(_MARK) :]
        stream.tokens += count
        stream.chunks += [now] * count
        if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server hung up"))


def load(
    port: int,
    model: str,
    *,
    clients: int,
    rounds: int,
    tokens: Sequence[int],
    spread_s: float = 0,
) -> list[Stream]:
    """Clients that ask `rounds` times each, one answer after the other, for any of `tokens`."""

    async def one(client: Client) -> list[Stream]:
        await asyncio.sleep(random.random() * spread_s)
        return [await client.ask(model, random.choice(tokens)) for _ in range(rounds)]

    async def all_of_them() -> list[Stream]:
        loop = asyncio.get_running_loop()
        made = [
            (await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(clients)
        ]
        done = await asyncio.gather(*map(one, made))
        for client in made:
            client.transport.close()
        return [stream for streams in done for stream in streams]

    return uvloop.run(all_of_them())
