"""What is to be loaded: is it there, which fields does it take, and how does it count tokens?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import aiohttp
import msgspec

from loadgen.client import RequestShape, StreamingClient
from loadgen.clock import Clock
from loadgen.prompts import CalibratedCutter
from loadgen.record import RequestRecord
from remoe.errors import SettingsError, UnavailableError

__all__ = ["Probe", "calibrate", "find_model", "find_shape", "probe_with"]

_POLL_S = 0.5
_PROBE_TOKENS = 2
# Tried until one fits the context; the short prompt is a fifth of the long one.
_LONG_CHARACTERS = (2000, 1000, 500, 250)
_USUAL_CHARACTERS_PER_TOKEN = 4.0

Probe = Callable[[RequestShape, str, int], Awaitable[RequestRecord]]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def find_model(
    session: aiohttp.ClientSession,
    base_url: str,
    *,
    model: str | None,
    timeout_s: float,
    clock: Clock,
) -> str:
    """Wait until the server lists its models and return the one to use; this wakes no model.

    Raises UnavailableError if it does not answer in time, and SettingsError if the model is not
    there or if there are several and none was named.
    """
    url = f"{base_url}/models"
    limit = clock.now() + timeout_s
    while True:
        body, problem = await _models_once(session, url, model, timeout_s)
        if problem is None:
            return _choose(base_url, body, model)
        if clock.now() >= limit:
            raise UnavailableError(
                f"{url} did not answer within {timeout_s:g} s: {problem}. Start the server (`remoe "
                "up`), or say where it is with --url."
            )
        await clock.sleep_until(clock.now() + _POLL_S)


async def _models_once(
    session: aiohttp.ClientSession, url: str, model: str | None, timeout_s: float
) -> tuple[bytes | None, str | None]:
    """Return (body, None), (None, None) from a server that lists no models, or (None, problem)."""
    try:
        async with asyncio.timeout(max(1.0, timeout_s)), session.get(url) as response:
            body, status = await response.read(), response.status
    except (aiohttp.ClientError, TimeoutError) as error:
        return None, str(error) or "no answer"
    if status in {401, 403}:
        raise SettingsError(
            f"{url} answers {status}: pass the key in REMOE_LOAD_API_KEY or OPENAI_API_KEY"
        )
    if status == 404 and model is not None:
        return None, None  # it may still have this one
    return (body, None) if status == 200 else (None, f"status {status}")


def _choose(base_url: str, body: bytes | None, model: str | None) -> str:
    if body is None and model is not None:
        return model
    try:
        names = [entry.id for entry in msgspec.json.decode(body or b"", type=_Models).data]
    except msgspec.DecodeError as error:
        raise SettingsError(f"{base_url} does not list models as OpenAI does: {error}") from error
    if model is None:
        if len(names) != 1:
            raise SettingsError(f"{base_url} has {names or 'no models'}; choose one with --model")
        return names[0]
    if model not in names:
        raise SettingsError(f"{base_url} has no model {model!r}, but {', '.join(names)}")
    return model


async def find_shape(shape: RequestShape, probe: Probe) -> tuple[RequestShape, list[str]]:
    """Send a small request and leave out what the server refuses, one field after the other.

    Returns the shape that works and a note for each field left out. Raises SettingsError if even
    the plainest request fails.
    """
    notes: list[str] = []
    while True:
        record = await probe(shape, "Say one word.", _PROBE_TOKENS)
        if record.status == "completed":
            break
        simpler = _simpler(shape, f"{record.error_detail}") if _refused(record) else None
        if simpler is None:
            raise SettingsError(
                f"{shape.url} fails with {record.error}: {record.error_detail}. Check --url, "
                "--model and --endpoint."
            )
        shape, note = simpler
        notes.append(note)
    if shape.ignore_eos and record.tokens < _PROBE_TOKENS:
        notes.append("the server takes ignore_eos but ends answers early all the same")
    if record.output_tokens is None:
        notes.append("the server reports no usage: output tokens are counted as chunks with text")
    return shape, notes


def _refused(record: RequestRecord) -> bool:
    return record.http_status is not None and 400 <= record.http_status < 500


def _simpler(shape: RequestShape, message: str) -> tuple[RequestShape, str] | None:
    """Leave out one optional field: one that the message names, else the least usual."""
    options = {
        "ignore_eos": (
            shape.ignore_eos,
            replace(shape, ignore_eos=False),
            (
                "the server refuses ignore_eos: answers end when the model ends them, and may be "
                "shorter than the trace's"
            ),
        ),
        "max_tokens": (
            shape.limit_name == "max_tokens" and "max_completion_tokens" in message,
            replace(shape, limit_name="max_completion_tokens"),
            "the server wants max_completion_tokens",
        ),
        "stream_options": (
            shape.include_usage,
            replace(shape, include_usage=False),
            "the server refuses stream_options: tokens are counted as chunks",
        ),
        "temperature": (
            shape.temperature is not None,
            replace(shape, temperature=None),
            "the server refuses temperature 0 and uses its own",
        ),
    }
    possible = {name: option for name, option in options.items() if option[0]}
    named = [name for name in possible if name in message]
    if not possible:
        return None
    _, simpler, note = possible[named[0] if named else next(iter(possible))]
    return simpler, note


async def calibrate(
    shape: RequestShape, probe: Probe, text: str
) -> tuple[CalibratedCutter, list[str]]:
    """Let the server count two prompts: the slope is the text's, the rest the chat template's."""
    remaining = list(_LONG_CHARACTERS)
    characters = remaining.pop(0)
    long = await probe(shape, text[:characters], 1)
    while long.status != "completed" and remaining:
        characters = remaining.pop(0)
        long = await probe(shape, text[:characters], 1)
    if long.status != "completed":
        return _usual(f"short prompts fail with {long.error}: {long.error_detail}")
    short = await probe(shape, text[: characters // 5], 1)
    if not long.prompt_tokens or not short.prompt_tokens:
        return _usual("the server does not say how many tokens a prompt has")
    added = long.prompt_tokens - short.prompt_tokens
    if added <= 0:
        return _usual("the server counts no more tokens for a longer prompt")
    per_token = (characters - characters // 5) / added
    return CalibratedCutter(per_token, max(0.0, long.prompt_tokens - characters / per_token)), []


def _usual(why: str) -> tuple[CalibratedCutter, list[str]]:
    usual = CalibratedCutter(_USUAL_CHARACTERS_PER_TOKEN)
    return usual, [f"{why}: {usual.characters_per_token:g} characters are taken for one token"]


def probe_with(session: aiohttp.ClientSession, clock: Clock, *, timeout_s: float) -> Probe:
    """A probe that really sends."""

    async def probe(shape: RequestShape, prompt: str, tokens: int) -> RequestRecord:
        record = RequestRecord(index=-1)
        client = StreamingClient(session, shape, clock, timeout_s=timeout_s, zero=clock.now())
        await client.send(record, shape.body(prompt, tokens))
        return record

    return probe
