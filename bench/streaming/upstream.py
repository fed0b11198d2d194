"""What answers at once: the main function's and the planner's protocols, and OpenAI's.

    python -m bench.streaming.upstream INTERVAL_S TOKENIZER_JSON

Prints its port. A token every INTERVAL_S, or as fast as they go with 0. A bare protocol, so that
what it takes itself is little, and is not counted as the gateway's. `GET /times` gives when each
request of the main function's protocol arrived and when each of its tokens left, and forgets it.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import cast

import msgspec
import uvloop
from tokenizers import Tokenizer

from remoe.experts import Partition
from remoe.generation import GenerateEvent, GenerationStats
from remoe.ledger import Ledger
from remoe.plan import Plan

TEXT = " processes"
# As fast as it goes, so many tokens a write: the source must not be what is measured.
TOKENS_A_WRITE = 8
_CONTENT_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


def _chunk(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: %b\n\n" % json.dumps({**head, "choices": [choice]}).encode()


@dataclass
class Wire:
    """What every answer is made of, encoded once."""

    interval_s: float
    event: bytes
    end: bytes
    plan: bytes
    chunk: bytes = _chunk({"content": TEXT}, None)
    chunks_end: bytes = _chunk({}, "length") + b"data: [DONE]\n\n"
    times: dict[str, tuple[float, list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, interval_s: float, tokenizer: Tokenizer) -> Wire:
        stats = GenerationStats(
            queue_s=0,
            first_token_s=0,
            total_s=0,
            prompt_tokens=4,
            output_tokens=1,
            deployment_plan_id="d",
            ledger=Ledger(),
            prefill_counts=[[4, 0]],
            decode_counts=[[0, 1]],
        )
        plan = Plan(
            plan_id="p",
            model="m",
            model_digest="d",
            partition=Partition(experts=2, remote=((1,),)),
            profile=[[0.5, 0.5]],
            main_memory_gb=1.0,
            functions=[],
            prewarm=[],
            neighbours=[],
            predicted_ttft_s=0.5,
            predicted_tpot_s=0.1,
            predicted_cost_usd=0.001,
        )
        token = tokenizer.encode(TEXT).ids[0]
        return cls(
            interval_s,
            event=msgspec.json.encode(GenerateEvent(tokens=[token])) + b"\n",
            end=msgspec.json.encode(GenerateEvent(finish="length", stats=stats)) + b"\n",
            plan=msgspec.json.encode(plan),
        )


class Upstream(asyncio.Protocol):
    """One connection; requests come one after the other."""

    transport: asyncio.WriteTransport

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._buffer = b""
        self._arrived = 0.0
        self._answer: _Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's has no such base

    def pause_writing(self) -> None:
        if self._answer is not None:
            self._answer.paused = True

    def resume_writing(self) -> None:
        if self._answer is not None:
            self._answer.resume()

    def data_received(self, data: bytes) -> None:
        if not self._buffer:
            self._arrived = time.perf_counter()
        self._buffer += data
        head, ended, rest = self._buffer.partition(b"\r\n\r\n")
        length = _CONTENT_LENGTH.search(head)
        if not ended or (length and len(rest) < int(length[1])):
            return
        self._buffer = b""
        self._reply(head.split(b" ")[1].decode(), rest)

    def _reply(self, path: str, body: bytes) -> None:
        wire = self._wire
        if path in {"/v1/generate", "/v1/chat/completions"}:
            ours = path == "/v1/generate"
            self._answer = _Answer(wire, self.transport, json.loads(body), self._arrived, ours=ours)
            return
        reply = wire.plan if path == "/v1/plan" else b"{}"
        if path == "/times":
            reply = json.dumps(wire.times).encode()
            wire.times.clear()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(reply), reply)
        )


class _Answer:
    """One stream of tokens, each at its time."""

    def __init__(
        self,
        wire: Wire,
        transport: asyncio.WriteTransport,
        asked: dict[str, int],
        arrived: float,
        *,
        ours: bool,
    ) -> None:
        self.paused = False
        self._held = False
        self._wire = wire
        self._transport = transport
        self._arrived = arrived
        self._left = asked["max_new_tokens" if ours else "max_tokens"]
        self._part, self._last = (wire.event, wire.end) if ours else (wire.chunk, wire.chunks_end)
        self._sent: list[float] = []
        if wire.interval_s:
            wire.times[str(asked["request_id"])] = (arrived, self._sent)
        self._loop = asyncio.get_running_loop()
        transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n"
            % (b"application/x-ndjson" if ours else b"text/event-stream")
        )
        self._loop.call_later(wire.interval_s, self._step)

    def resume(self) -> None:
        self.paused = False
        if self._held:
            self._held = False
            self._step()

    def _step(self) -> None:
        if self.paused:
            self._held = True
            return
        interval_s = self._wire.interval_s
        count = 1 if interval_s else min(TOKENS_A_WRITE, self._left)
        self._left -= count
        self._sent.append(time.perf_counter())
        self._write(self._part * count)
        if not self._left:
            self._write(self._last)
            self._transport.write(b"0\r\n\r\n")
        elif interval_s:
            due = self._arrived + interval_s * (len(self._sent) + 1)
            self._loop.call_later(max(0, due - time.perf_counter()), self._step)
        else:
            self._loop.call_soon(self._step)

    def _write(self, body: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


async def serve(wire: Wire) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Upstream(wire), sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(Wire.of(float(sys.argv[1]), Tokenizer.from_file(sys.argv[2]))))
