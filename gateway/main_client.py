"""The main function, seen from the gateway: one generation is one NDJSON stream.

Its failures become this gateway's errors here; their texts go to the log, never to the client.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from http import HTTPStatus

import aiohttp
import msgspec
import structlog

from gateway.alarm import Alarm
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
from remoe.tracing import outgoing_headers

__all__ = [
    "GenerationStream",
    "InterruptedGenerationError",
    "LostMainFunctionError",
    "MainClient",
]

_log = structlog.get_logger()
_event_decoder = msgspec.json.Decoder(GenerateEvent)
_MAX_ERROR_BYTES = 64 * 1024
_ERROR_BODY_TIMEOUT_S = 5.0
# Below Knative's shortest window: who answered so lately has not scaled to zero since.
_WARM_FOR_S = 5.0
# How often a request that waits looks whether it waits for a function that runs.
_LOOK_PERIOD_S = 1.0


class InterruptedGenerationError(InternalError):
    """The answer broke off after it had begun; trying again by itself would pay for it twice."""

    code = "generation_interrupted"


class LostMainFunctionError(InterruptedGenerationError):
    """The main function, or the way to it, is gone: its successor may answer."""


class _Failure(msgspec.Struct):
    message: str = ""
    code: str | None = None


class _FailureEnvelope(msgspec.Struct):
    error: _Failure


class GenerationStream:
    """The events of one running generation, and the cold start its opening waited for."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        *,
        cold_start: MainColdStart,
        silence_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        self.cold_start = cold_start
        self._response = response
        self._silence_timeout_s = silence_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._silence = Alarm(silence_timeout_s, lambda: self._give_up(self._silent))
        self._stall = Alarm(stall_timeout_s, lambda: self._give_up(self._stalled))
        self._waits = False
        self._rest = b""
        self._failure: InterruptedGenerationError | None = None

    async def read(self) -> Sequence[GenerateEvent]:
        """The next events, as they arrive together; to be called until one of them has `finish`.

        Raises LostMainFunctionError after a silence, in which not even a report came, and
        DeadlineError if it is only reports that come for too long.
        """
        events: list[GenerateEvent] = []
        while not events:
            if self._failure is not None:
                raise self._failure
            # Only a reader that waits can be kept waiting: a slow client holds this one up.
            self._silence.heard()
            *lines, self._rest = (self._rest + await self._data()).split(b"\n")
            events, self._failure = _read(lines)
        if any(event.tokens for event in events):
            self._stall.heard()
        return events

    def close(self) -> None:
        """Look out for nothing any more."""
        self._silence.stop()
        self._stall.stop()

    async def _data(self) -> bytes:
        self._waits = True
        try:
            data = await self._response.content.readany()
        # What TCP itself finds out comes as an OSError, a client error or not.
        except (aiohttp.ClientError, OSError) as error:
            raise _lost(repr(error)) from error
        finally:
            self._waits = False
        if not data:
            raise _lost("the stream ended early")
        return data

    def _give_up(self, reason: Callable[[], RemoeError]) -> None:
        if self._waits:
            self._response.content.set_exception(reason())

    def _silent(self) -> RemoeError:
        return _lost(f"silent for {self._silence_timeout_s:g} s")

    def _stalled(self) -> RemoeError:
        return DeadlineError(
            f"The model produced nothing for {self._stall_timeout_s:g} s, so the request "
            "was given up. Try again later."
        )


def _read(lines: list[bytes]) -> tuple[list[GenerateEvent], InterruptedGenerationError | None]:
    """The events up to the first that tells of a failure, or cannot be read, and that failure."""
    events: list[GenerateEvent] = []
    for line in lines:
        try:
            event = _decode(line)
        except InterruptedGenerationError as error:
            return events, error
        if event.finish == "error":
            _log.error("the main function failed", reason=event.error)
            events.append(GenerateEvent(ledger=event.ledger))
            return events, InterruptedGenerationError(
                "The model failed while it worked on the answer. Send the request again."
            )
        events.append(event)
    return events, None


def _decode(line: bytes) -> GenerateEvent:
    try:
        return _event_decoder.decode(line)
    except msgspec.DecodeError as error:
        _log.exception("cannot read an event of the main function")
        raise InterruptedGenerationError(
            "The answer of the model could not be read. Send the request again."
        ) from error


def _lost(reason: str) -> LostMainFunctionError:
    _log.warning("the main function broke off", reason=reason)
    return LostMainFunctionError(
        "The model stopped before the answer was complete. Send the request again."
    )


class MainClient:
    """Opens generations; the request is held while the main function starts."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        fresh: aiohttp.ClientSession,
        url: str,
        *,
        line: Line,
        timings: Timings,
        ready_for_s: Callable[[], float],
        cold_start_timeout_s: float,
        silence_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        """`ready_for_s` tells how long the main function has been known to run, 0 if it is not."""
        self._http = http
        self._fresh = fresh
        self._line = line
        self._timings = timings
        self._url = f"{url}/v1/generate"
        self._ready_for_s = ready_for_s
        self._cold_start_timeout_s = cold_start_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._answered_at = -math.inf
        self._open_streams = 0

    @property
    def warm(self) -> bool:
        """Whether the main function must be running: it answers, or did a moment ago."""
        return self._open_streams > 0 or time.monotonic() - self._answered_at < _WARM_FOR_S

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerationStream]:
        """Run one generation; leaving the block early closes the connection, which cancels it."""
        started = time.perf_counter()
        with self._line.start():
            response = await self._open(msgspec.json.encode(request))
        try:
            waited_s = time.perf_counter() - started
            if response.status != HTTPStatus.OK:
                raise await self._refusal(response)
            cold_start = _cold_start(response.headers, waited_s)
            # Whoever joins a start half-way learns little about how long one takes.
            if cold_start.activation_s > 0:
                self._timings.started(cold_start.total_s)
            stream = GenerationStream(
                response,
                cold_start=cold_start,
                silence_timeout_s=self._silence_timeout_s,
                stall_timeout_s=self._stall_timeout_s,
            )
            with self._streaming(), closing(stream):
                yield stream
        finally:
            # Unless all of it was read, this closes the connection.
            response.close()

    @contextmanager
    def _streaming(self) -> Iterator[None]:
        self._open_streams += 1
        try:
            yield
            self._answered_at = time.monotonic()
        finally:
            self._open_streams -= 1

    async def _open(self, body: bytes) -> aiohttp.ClientResponse:
        try:
            async with self._patience():
                try:
                    return await self._send(self._http, body)
                except aiohttp.ClientError as error:
                    # A kept-alive connection to a replica that has just left, or one that died
                    # before it answered: nothing was generated, so ask once more. Other kept-alive
                    # connections may have ended with it.
                    _log.info("asking the main function again", reason=repr(error))
                    return await self._send(self._fresh, body)
        except aiohttp.ClientError as error:
            _log.warning("cannot reach the main function", reason=repr(error))
            raise UnavailableError(
                "The model cannot be reached at the moment. Try again in a few seconds.",
                retry_after_s=5,
            ) from error
        except TimeoutError:
            if self._silent():
                raise DeadlineError(
                    f"The model is running and did not answer for {self._silence_timeout_s:g} s. "
                    "Try again in a few seconds."
                ) from None
            raise DeadlineError(
                f"The model did not start within {self._cold_start_timeout_s:g} s. Try again later."
            ) from None

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """Wait for a response to begin: as long as a cold start may take, unless there is none.

        A running main function answers at once. One that a runtime knows to have run all the time
        since it was asked, and says nothing, is frozen or cut off. Raises TimeoutError.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._cold_start_timeout_s) as limit:
            timer: asyncio.TimerHandle | None = None

            def look_in(delay_s: float) -> None:
                nonlocal timer
                timer = loop.call_later(delay_s, look)

            def look() -> None:
                if self._silent():
                    limit.reschedule(loop.time())
                else:
                    look_in(_LOOK_PERIOD_S)

            look_in(self._silence_timeout_s)
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()

    def _silent(self) -> bool:
        return self._ready_for_s() >= self._silence_timeout_s

    async def _send(self, http: aiohttp.ClientSession, body: bytes) -> aiohttp.ClientResponse:
        headers = {"content-type": "application/json"} | outgoing_headers()
        return await http.post(self._url, data=body, headers=headers)

    async def _refusal(self, response: aiohttp.ClientResponse) -> RemoeError:
        """The error a client gets for a main function's answer other than 200."""
        body = b""
        try:
            async with asyncio.timeout(_ERROR_BODY_TIMEOUT_S):
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > _MAX_ERROR_BYTES:
                        break
        except (aiohttp.ClientError, TimeoutError):
            _log.warning("an error of the main function came without its text")
        try:
            failure = msgspec.json.decode(body, type=_FailureEnvelope).error
        except msgspec.DecodeError:  # Knative's own failures are plain text
            failure = _Failure(message=body[:200].decode("utf-8", "replace"))
        status = response.status
        _log.warning("the main function refused", status=status, reason=failure.message)
        if failure.code == ContextLengthError.code:
            return ContextLengthError(
                "The prompt and the requested answer do not fit the memory this model runs with. "
                "Shorten the prompt or ask for fewer tokens.",
            )
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return QueueFullError(
                "Too many requests are waiting for this model. Try again later.",
                retry_after_s=_retry_after_s(response, self._timings.service_s or 2),
            )
        if status == HTTPStatus.GATEWAY_TIMEOUT:
            return DeadlineError(
                "The model did not start in time. Try again later.",
                retry_after_s=_retry_after_s(response, self._timings.start_s or 10),
            )
        if status in {HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE}:
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


def _retry_after_s(response: aiohttp.ClientResponse, default_s: float) -> float:
    value = response.headers.get("retry-after", "")
    # Above two minutes OpenAI's client gives up at once.
    return min(float(value) if value.isdecimal() else default_s, 120.0)
