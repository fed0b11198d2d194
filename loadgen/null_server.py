"""A server that computes nothing: what the load generator itself costs, measured against it.

    python -m loadgen.null_server --port 8001 --ttft-ms 20 --itl-ms 5

It answers OpenAI's streaming endpoints with as many words as asked for, at exact times, on one core,
and prints its address. Use it to see whether this machine can generate the load you want.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from itertools import chain
from typing import cast

import httptools
import msgspec

__all__ = ["NullServer"]

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_WHOLE = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
_MODEL = "null"


class _Stream:
    """The chunks of one endpoint, as they go on the wire."""

    def __init__(
        self, object_name: str, word: dict[str, object], nothing: dict[str, object]
    ) -> None:
        self._frame = {"id": "null-1", "object": object_name, "created": 0, "model": _MODEL}
        self._nothing = nothing
        self.word = self._event([{"index": 0, **word, "finish_reason": None}])

    def end(self, *, prompt_tokens: int, output_tokens: int) -> bytes:
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
        }
        return (
            self._event([{"index": 0, **self._nothing, "finish_reason": "length"}])
            + self._event([], usage)
            + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        )

    def _event(self, choices: list[dict[str, object]], usage: object = None) -> bytes:
        data = msgspec.json.encode({**self._frame, "choices": choices, "usage": usage})
        return b"%x\r\ndata: %s\n\n\r\n" % (len(data) + 8, data)


_STREAMS = {
    b"chat/completions": _Stream(
        "chat.completion.chunk", {"delta": {"content": " word"}}, {"delta": {}}
    ),
    b"completions": _Stream("text_completion", {"text": " word"}, {"text": ""}),
}


class _Message(msgspec.Struct):
    content: str = ""


class _Asked(msgspec.Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    messages: list[_Message] = []
    prompt: str = ""

    @property
    def tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 16

    @property
    def words(self) -> int:
        texts = [self.prompt, *(message.content for message in self.messages)]
        return sum(len(text.split()) for text in texts)


class _Connection(asyncio.Protocol):
    """One connection; one request at a time, as HTTP/1.1 clients do."""

    def __init__(self, server: NullServer) -> None:
        self._server = server
        self._body = b""
        self._url = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        kind = self._url.rpartition(b"/v1/")[2]
        if kind == b"models":
            self._whole(b"200 OK", {"object": "list", "data": [{"id": _MODEL, "object": "model"}]})
        elif kind not in _STREAMS or self._parser.get_method() != b"POST":
            self._whole(b"404 Not Found", {"error": {"message": "not found", "code": None}})
        else:
            try:
                asked = msgspec.json.decode(self._body, type=_Asked)
            except msgspec.DecodeError as error:
                self._whole(b"400 Bad Request", {"error": {"message": str(error), "code": None}})
            else:
                self._stream(_STREAMS[kind], asked)

    def _whole(self, status: bytes, payload: object) -> None:
        body = msgspec.json.encode(payload)
        self._transport.write(_WHOLE % (status, len(body), body))

    def _stream(self, stream: _Stream, asked: _Asked) -> None:
        server, tokens = self._server, asked.tokens
        end = stream.end(prompt_tokens=asked.words, output_tokens=tokens)
        if server.itl_s and tokens > 1:
            middle = (stream.word for _ in range(tokens - 2))
            pieces = chain([_HEAD + stream.word], middle, [stream.word + end])
        else:
            pieces = chain([_HEAD + stream.word * tokens + end])
        loop = asyncio.get_running_loop()
        due = loop.time() + server.ttft_s
        if server.ttft_s:
            loop.call_at(due, self._send, due, pieces)
        else:
            self._send(due, pieces)

    def _send(self, due: float, pieces: Iterator[bytes]) -> None:
        """Write one piece, and the others in their turn at absolute times."""
        piece = next(pieces, None)
        if piece is None or self._transport.is_closing():
            return
        self._transport.write(piece)
        if self._server.itl_s:
            following = due + self._server.itl_s
            asyncio.get_running_loop().call_at(following, self._send, following, pieces)


class NullServer:
    """`ttft_s` to the first word, `itl_s` between words; with 0, all words at once."""

    def __init__(self, *, ttft_s: float = 0.0, itl_s: float = 0.0) -> None:
        self.ttft_s = ttft_s
        self.itl_s = itl_s

    async def start(self, port: int = 0) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: _Connection(self), "127.0.0.1", port)


async def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-ms", type=float, default=0.0)
    parser.add_argument("--itl-ms", type=float, default=0.0)
    options = parser.parse_args()
    server = NullServer(ttft_s=options.ttft_ms / 1e3, itl_s=options.itl_ms / 1e3)
    listening = await server.start(options.port)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", flush=True)  # noqa: T201
    await listening.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_main())
