"""Sending an answer: whole or as an event stream, for as long as the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway.admission import Job
from gateway.alarm import Alarm
from gateway.errors import internal_error
from gateway.events import CLIENT_GONE, Trace
from gateway.formats import ChatFormat, CompletionFormat, ReplyFormat, WholeChoice
from gateway.generation import ChoiceDelta, Generation, Services
from gateway.receipt import Receipt
from gateway.replies import Usage
from gateway.response_replies import ResponseFormat
from gateway.vocabulary import Vocabulary
from remoe.errors import RemoeError

__all__ = ["Answer"]

_log = structlog.get_logger()
_encoder = msgspec.json.Encoder()
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Or nginx would collect the tokens.
    (b"x-accel-buffering", b"no"),
]


class Answer(Response):
    """The reply to one job. Errors before the first byte are raised, for their status."""

    def __init__(self, job: Job, services: Services, trace: Trace, *, heartbeat_s: float) -> None:
        super().__init__()
        self._job = job
        self._services = services
        self._trace = trace
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; if the client leaves first, cancel the work down to the main function."""
        sent_all = left = False
        work = asyncio.current_task()
        assert work is not None  # noqa: S101  # an ASGI server runs apps in tasks

        async def send_noting(message: Message) -> None:
            nonlocal sent_all
            # Servers report a disconnect after a complete answer too.
            sent_all = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        def leave(_: asyncio.Task[None]) -> None:
            nonlocal left
            if not sent_all:
                left = True
                work.cancel()

        gone = asyncio.create_task(_client_gone(receive))
        gone.add_done_callback(leave)
        try:
            await self._answer(send_noting)
        except asyncio.CancelledError:
            if not left:
                raise
            work.uncancel()
            self._trace.status = CLIENT_GONE
        finally:
            gone.remove_done_callback(leave)
            gone.cancel()

    async def _answer(self, send: Send) -> None:
        reply = _format_for(self._job, self._services.text.vocabulary)
        trace = self._trace
        trace.reply_id, trace.model = reply.id, self._job.model
        trace.streamed = self._job.stream
        trace.prompt_tokens = self._job.prompt_tokens
        generation = Generation(
            self._job, self._services, reply_id=reply.id, received_at=trace.received_at
        )
        way = self._stream if self._job.stream else self._whole
        try:
            await way(generation, reply, send)
        finally:
            generation.leave()
            self._close(generation)
        if generation.finished():
            generation.report()

    def _close(self, generation: Generation) -> Receipt:
        """Put the receipt where the ledger takes it from; before the answer's last part."""
        self._trace.completion_tokens = generation.completion_tokens
        self._trace.plan, self._trace.records = generation.first_plan, generation.records
        self._trace.receipt = generation.receipt()
        return self._trace.receipt

    def _usage(self, generation: Generation) -> Usage:
        prompt, completion = self._job.prompt_tokens, generation.completion_tokens
        return Usage(prompt, completion, prompt + completion)

    async def _whole(self, generation: Generation, reply: ReplyFormat, send: Send) -> None:
        wholes: dict[int, WholeChoice] = {}

        async def take(delta: ChoiceDelta) -> None:
            if delta.finish:  # each comes in one piece
                wholes[delta.index] = WholeChoice(delta.shown, delta.finish)

        await generation.run(take)
        choices = [wholes[index] for index in generation.best()]
        body = _encoder.encode(
            reply.whole(choices, self._usage(generation), self._close(generation))
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, generation: Generation, reply: ReplyFormat, send: Send) -> None:
        """Send chunks as they come. The headers wait for the first one, or for one heartbeat."""
        stream = _EventStream(send, reply)
        heartbeat = Alarm(self._heartbeat_s, lambda: stream.beat(generation.progress.comment()))

        async def take(delta: ChoiceDelta) -> None:
            heartbeat.heard()
            last = generation.finished() and not self._job.include_usage
            await stream.data(reply.chunks(delta, self._close(generation) if last else None))

        try:
            await generation.run(take)
            if self._job.include_usage:
                usage = reply.usage_chunk(self._usage(generation), self._close(generation))
                await stream.data([usage])
            await stream.end(reply.end)
        except RemoeError as error:
            await self._break_off(stream, error)
        except Exception as error:
            if not stream.begun:
                raise
            _log.exception("a stream failed")
            await self._break_off(stream, internal_error(), cause=error)
        finally:
            heartbeat.stop()
            stream.stop()

    async def _break_off(
        self, stream: _EventStream, error: RemoeError, cause: Exception | None = None
    ) -> None:
        """After the first byte an error is an event, the last one."""
        if not stream.begun:
            raise error from cause
        self._trace.error_code = error.code
        await stream.fail(error)


def _format_for(job: Job, vocabulary: Vocabulary) -> ReplyFormat:
    if job.kind == "responses":
        return ResponseFormat(job)
    return (ChatFormat if job.kind == "chat" else CompletionFormat)(job, vocabulary)


class _EventStream:
    """Server-sent events over ASGI, one write after the other; the first opens the response."""

    def __init__(self, send: Send, reply: ReplyFormat) -> None:
        self._send = send
        self._reply = reply
        self._writing = asyncio.Lock()
        self._beating: asyncio.Task[None] | None = None
        self.begun = False

    async def data(self, objects: Sequence[msgspec.Struct]) -> None:
        await self._write(b"".join(map(self._reply.frame, objects)))

    async def fail(self, error: RemoeError) -> None:
        await self._write(self._reply.frame(self._reply.failure(error)), more=False)

    async def end(self, last: bytes) -> None:
        await self._write(last, more=False)

    def beat(self, comment: str) -> None:
        """Send a comment soon, unless something is on its way to the client anyway."""
        if not self._writing.locked():
            self._beating = asyncio.create_task(self._write(f": {comment}\n\n".encode()))

    def stop(self) -> None:
        """Send no comment any more."""
        if self._beating is not None:
            self._beating.cancel()

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        async with self._writing:
            if not self.begun:
                self.begun = True
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
                )
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
