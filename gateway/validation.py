"""From a request body to a checked request, or to an error that says what to change."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from remoe.errors import InvalidRequestError, RemoeError, RequestTooLargeError

__all__ = ["SlowRequestError", "parse_body", "read_body"]

_Model = TypeVar("_Model", bound=BaseModel)

_BODY_TIMEOUT_S = 60.0
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "list_type": "an array",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "string_type": "a string",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


class SlowRequestError(RemoeError):
    """The client stopped sending half-way; the connection cannot be used again."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    retryable = True


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the whole body.

    Raises RequestTooLargeError as soon as it is known to be too large, and SlowRequestError.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise SlowRequestError(
            f"The request's body did not arrive within {_BODY_TIMEOUT_S:g} s. Send it again."
        ) from None
    return bytes(body)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"The request body is larger than the {max_bytes:,} bytes this server accepts. Send "
        "fewer or shorter prompts per request."
    )


def parse_body(body: bytes, model: type[_Model]) -> _Model:
    """Decode and validate; raises InvalidRequestError for the first thing that is wrong."""
    try:
        data: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"We could not parse the JSON body of your request: {error}. Send one JSON object, "
            "for example with a client library or `curl -d @request.json`."
        ) from error
    if not isinstance(data, dict):
        raise InvalidRequestError(
            f"The request body must be a JSON object, not {_kind(data)}.",
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)[0]
        raise _explain(details) from None


def _explain(details: ErrorDetails) -> InvalidRequestError:
    param = _path(details["loc"])
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
    elif kind in _EXPECTED:
        message = f"Invalid type for '{param}': expected {_EXPECTED[kind]}, got {_kind(value)}."
    elif kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        message = (
            f"Invalid value for '{param}': {_shown(value)}; it must be {words} {context[bound]}."
        )
    elif kind == "literal_error":
        message = (
            f"Invalid value for '{param}': {_shown(value)}. Supported values are: "
            f"{context['expected']}."
        )
    elif kind == "too_short":
        message = f"'{param}' must not be empty; give at least {context['min_length']}."
    elif kind == "too_long":
        message = f"'{param}' has too many entries; give at most {context['max_length']}."
    elif kind == "string_too_short":
        message = f"'{param}' must not be an empty string; leave it out instead."
    else:
        message = f"Invalid value for '{param}': {details['msg']}."
    return InvalidRequestError(message, param=param)


def _path(steps: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content", "<parts>", 1, "text")` as `messages[0].content[1].text`."""
    path = ""
    for step in steps:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not re.fullmatch(r"<\w+>|\[key\]", step):
            path += f".{step}" if path else step
    return path


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
