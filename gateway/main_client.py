"""The main function, seen from the gateway: one generation is one NDJSON stream.

Its failures become this gateway's errors here; their texts go to the log, never to the client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
import msgspec
import structlog

from gateway.line import Line
from gateway.receipt import WARM, MainColdStart
from gateway.timings import Timings
from remoe.errors import (
    ContextLengthError,
    DeadlineError,
    ExpertUnavailableError,
    InternalError,
    QueueFullError,
    RemoeError,
    UnavailableError,
)
from remoe.generation import GenerateEvent, GenerateRequest
from remoe.lifecycle import READY_FOR_HEADER, START_HEADER

__all__ = ["GenerationStream", "InterruptedGenerationError", "MainClient"]

_log = structlog.get_logger()
_event_decoder = msgspec.json.Decoder(GenerateEvent)
_MAX_ERROR_BYTES = 64 * 1024
_ERROR_BODY_TIMEOUT_S = 5.0


class InterruptedGenerationError(InternalError):
    """The answer broke off after it had begun; trying again by itself would pay for it twice."""

    code = "generation_interrupted"


class _Failure(msgspec.Struct):
    message: str = ""
    code: str | None = None


class _FailureEnvelope(msgspec.Struct):
    error: _Failure


class GenerationStream:
    """The events of one running generation, and the cold start its opening waited for."""

    def __init__(
        self, response: httpx.Response, *, cold_start: MainColdStart, stall_timeout_s: float
    ) -> None:
        self.cold_start = cold_start
        self._response = response
        self._stall_timeout_s = stall_timeout_s

    async def events(self) -> AsyncGenerator[GenerateEvent, None]:
        """Yield events up to and with the one that has `finish`."""
        chunks = aiter(self._response.aiter_bytes())
        rest = b""
        while True:
            try:
                async with asyncio.timeout(self._stall_timeout_s):
                    rest += await anext(chunks)
            except TimeoutError:
                raise DeadlineError(
                    f"The model produced nothing for {self._stall_timeout_s:g} s, so the request "
                    "was given up. Try again later."
                ) from None
            except (httpx.TransportError, StopAsyncIteration) as error:
                _log.warning("the main function broke off", reason=repr(error))
                raise InterruptedGenerationError(
                    "The model stopped before the answer was complete. Send the request again."
                ) from error
            *lines, rest = rest.split(b"\n")
            for line in lines:
                event = self._decode(line)
                yield event
                if event.finish is not None:
                    return

    def _decode(self, line: bytes) -> GenerateEvent:
        try:
            event = _event_decoder.decode(line)
        except msgspec.DecodeError as error:
            _log.exception("cannot read an event of the main function")
            raise InterruptedGenerationError(
                "The answer of the model could not be read. Send the request again."
            ) from error
        if event.finish == "error":
            _log.error("the main function failed", reason=event.error)
            raise InterruptedGenerationError(
                "The model failed while it worked on the answer. Send the request again."
            )
        return event


class MainClient:
    """Opens generations; the request is held while the main function starts."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        url: str,
        *,
        line: Line,
        timings: Timings,
        cold_start_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        self._http = http
        self._line = line
        self._timings = timings
        self._url = f"{url}/v1/generate"
        self._cold_start_timeout_s = cold_start_timeout_s
        self._stall_timeout_s = stall_timeout_s

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerationStream]:
        """Run one generation; leaving the block early closes the connection, which cancels it."""
        started = time.perf_counter()
        with self._line.start():
            response = await self._open(msgspec.json.encode(request))
        try:
            waited_s = time.perf_counter() - started
            if response.status_code != httpx.codes.OK:
                raise await self._refusal(response)
            cold_start = _cold_start(response.headers, waited_s)
            # Whoever joins a start half-way learns little about how long one takes.
            if cold_start.activation_s > 0:
                self._timings.started(cold_start.total_s)
            yield GenerationStream(
                response,
                cold_start=cold_start,
                stall_timeout_s=self._stall_timeout_s,
            )
        finally:
            await response.aclose()

    async def _open(self, body: bytes) -> httpx.Response:
        try:
            async with asyncio.timeout(self._cold_start_timeout_s):
                try:
                    return await self._send(body)
                except httpx.TransportError as error:
                    # A kept-alive connection to a replica that has just left, or one that died
                    # before it answered: nothing was generated, so ask once more.
                    _log.info("asking the main function again", reason=repr(error))
                    return await self._send(body)
        except TimeoutError:
            raise DeadlineError(
                f"The model did not start within {self._cold_start_timeout_s:g} s. Try again later."
            ) from None
        except httpx.TransportError as error:
            _log.warning("cannot reach the main function", reason=repr(error))
            raise UnavailableError(
                "The model cannot be reached at the moment. Try again in a few seconds.",
                retry_after_s=5,
            ) from error

    async def _send(self, body: bytes) -> httpx.Response:
        request = self._http.build_request(
            "POST", self._url, content=body, headers={"content-type": "application/json"}
        )
        return await self._http.send(request, stream=True)

    async def _refusal(self, response: httpx.Response) -> RemoeError:
        """The error a client gets for a main function's answer other than 200."""
        body = b""
        try:
            async with asyncio.timeout(_ERROR_BODY_TIMEOUT_S):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _MAX_ERROR_BYTES:
                        break
        except (httpx.TransportError, TimeoutError):
            _log.warning("an error of the main function came without its text")
        try:
            failure = msgspec.json.decode(body, type=_FailureEnvelope).error
        except msgspec.DecodeError:  # Knative's own failures are plain text
            failure = _Failure(message=body[:200].decode("utf-8", "replace"))
        status = response.status_code
        _log.warning("the main function refused", status=status, reason=failure.message)
        if failure.code == ContextLengthError.code:
            return ContextLengthError(
                "The prompt and the requested answer do not fit the memory this model runs with. "
                "Shorten the prompt or ask for fewer tokens.",
            )
        if status == httpx.codes.TOO_MANY_REQUESTS:
            return QueueFullError(
                "Too many requests are waiting for this model. Try again later.",
                retry_after_s=_retry_after_s(response, self._timings.service_s or 2),
            )
        if status == httpx.codes.GATEWAY_TIMEOUT:
            return DeadlineError(
                "The model did not start in time. Try again later.",
                retry_after_s=_retry_after_s(response, self._timings.start_s or 10),
            )
        if status in {httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE}:
            kind = (
                ExpertUnavailableError
                if failure.code == ExpertUnavailableError.code
                else UnavailableError
            )
            return kind(
                "The model is starting or restarting. Try again in a few seconds.",
                retry_after_s=_retry_after_s(response, self._timings.start_s or 5),
            )
        return InternalError("The model could not work on this request. The failure was logged.")


def _cold_start(headers: Mapping[str, str], waited_s: float) -> MainColdStart:
    """What of the wait was a cold start, all of it that came before the replica was ready.

    A request that arrived while the replica was starting pays for the rest of the start only: the
    parts are counted backwards from when it was ready.
    """
    try:
        left_s = max(0.0, waited_s - float(headers[READY_FOR_HEADER]) / 1e3)
    except (KeyError, ValueError):
        return WARM
    try:
        boot_ms, load_ms = (float(part) for part in headers[START_HEADER].split(","))
    except (KeyError, ValueError):
        return MainColdStart(activation_s=left_s)
    load_s = min(left_s, load_ms / 1e3)
    boot_s = min(left_s - load_s, boot_ms / 1e3)
    return MainColdStart(left_s - load_s - boot_s, boot_s, load_s)


def _retry_after_s(response: httpx.Response, default_s: float) -> float:
    value = response.headers.get("retry-after", "")
    # Above two minutes OpenAI's client gives up at once.
    return min(float(value) if value.isdecimal() else default_s, 120.0)
