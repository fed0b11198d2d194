"""The client: one streamed request, with the time of everything that comes back.

aiohttp, since the client's own CPU time is measured along with the server: at 500 requests/s it
needs a little more than a third of httpx's (bench/load_rate.py).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp
import msgspec

from loadgen.chunks import decode_chunk, error_message
from loadgen.clock import Clock
from loadgen.record import RequestRecord
from loadgen.sse import EventSplitter

__all__ = ["RequestShape", "StreamingClient", "open_session"]

_DONE = b"[DONE]"


def open_session(*, api_key: str | None) -> aiohttp.ClientSession:
    """A session without a limit on connections: a queue in the client would hide the server's."""
    own = {"content-type": "application/json", "accept": "text/event-stream"}
    if api_key:
        own["authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=own,
        auto_decompress=True,
        trust_env=False,
    )


@dataclass(frozen=True, slots=True)
class RequestShape:
    """Which fields this server takes; found out before the run."""

    base_url: str
    model: str
    endpoint: str = "chat"
    ignore_eos: bool = True
    limit_name: str = "max_tokens"
    include_usage: bool = True
    temperature: float | None = 0.0

    @property
    def url(self) -> str:
        path = "chat/completions" if self.endpoint == "chat" else "completions"
        return f"{self.base_url}/{path}"

    def body(self, prompt: str, output_tokens: int) -> bytes:
        fields: dict[str, object] = {"model": self.model, "stream": True}
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        fields[self.limit_name] = output_tokens
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.include_usage:
            fields["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(fields)


class StreamingClient:
    """Sends requests and fills their records; nothing a server does raises."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        shape: RequestShape,
        clock: Clock,
        *,
        timeout_s: float,
        zero: float,
    ) -> None:
        """`zero` is the clock's time that records count from."""
        self._session = session
        self._shape = shape
        self._clock = clock
        self._timeout_s = timeout_s
        self._zero = zero

    def _now_s(self) -> float:
        return self._clock.now() - self._zero

    async def send(self, record: RequestRecord, body: bytes) -> None:
        """Post the body and read to the end; the record's status says how it went."""
        record.sent_s = self._now_s()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(record, body)
        except TimeoutError:
            _fail(record, "timeout", f"no end within {self._timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            _fail(record, "connect", str(error))
        except aiohttp.ClientError as error:
            _fail(record, "connection", f"{type(error).__name__}: {error}")
        except msgspec.DecodeError as error:
            _fail(record, "bad chunk", str(error))
        except asyncio.CancelledError:
            record.status = "cancelled"
            raise
        finally:
            record.last_s = self._now_s()

    async def _exchange(self, record: RequestRecord, body: bytes) -> None:
        async with self._session.post(self._shape.url, data=body) as response:
            record.http_status = response.status
            if response.status != 200:
                code, message = error_message(await response.read())
                _fail(record, f"http {response.status}" + (f" {code}" if code else ""), message)
                return
            if not response.content_type.startswith("text/event-stream"):
                _fail(record, "not a stream", f"the reply is {response.content_type}")
                return
            splitter = EventSplitter()
            async for data in response.content.iter_any():
                now_s = self._now_s()
                for event in splitter.feed(data):
                    if event == _DONE:
                        record.status = "completed"
                    elif not self._take(record, event, now_s):
                        return
        if record.status != "completed":
            if record.finish_reason:  # some servers end without [DONE]
                record.status = "completed"
            else:
                record.status = "incomplete"
                record.error = "incomplete stream"
                record.error_detail = "the stream ended without finish_reason and [DONE]"

    def _take(self, record: RequestRecord, event: bytes, now_s: float) -> bool:
        """Note what one chunk says; False if it is an error."""
        chunk = decode_chunk(event)
        if chunk.failed:
            code, message = error_message(event)
            _fail(record, "stream error" + (f" {code}" if code else ""), message)
            return False
        if chunk.has_text:
            if record.first_token_s is None:
                record.first_token_s = now_s
            else:
                record.itl_s.append(now_s - (record.last_s or now_s))
            record.chunks += 1
            record.last_s = now_s
        if chunk.finish_reason:
            record.finish_reason = chunk.finish_reason
        if chunk.usage is not None:
            record.prompt_tokens = chunk.usage.prompt_tokens
            record.output_tokens = chunk.usage.completion_tokens
        if chunk.x_remoe is not None:
            record.receipt = chunk.x_remoe
        return True


def _fail(record: RequestRecord, label: str, detail: str) -> None:
    record.status = "failed"
    record.error = label
    record.error_detail = detail[:500]
