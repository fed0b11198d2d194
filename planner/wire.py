"""JSON in and out of the service: bounded bodies, typed messages, OpenAI's error envelope."""

from __future__ import annotations

import http
import math
import re
from typing import TypeVar

import msgspec
import structlog
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from remoe.errors import InternalError, InvalidRequestError, RemoeError, RequestTooLargeError

__all__ = ["add_error_handlers", "json_response", "read_message"]

_log = structlog.get_logger()
_encoder = msgspec.json.Encoder()
_Message = TypeVar("_Message")

# A whole context of token ids and two count matrices of a 61-layer, 256-expert model fit well.
MAX_BODY_BYTES = 4_000_000
_AT_PATH = re.compile(r"`\$\.?(?P<path>[^`]*)`$")


def json_response(message: object, status: int = 200) -> Response:
    return Response(_encoder.encode(message), status_code=status, media_type="application/json")


async def read_message(request: Request, kind: type[_Message]) -> _Message:
    """Decode the body; raises RequestTooLargeError or InvalidRequestError naming the field."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestTooLargeError(f"The body is larger than {MAX_BODY_BYTES} bytes.")
    try:
        return msgspec.json.decode(bytes(body), type=kind)
    except msgspec.ValidationError as error:
        match = _AT_PATH.search(str(error))
        raise InvalidRequestError(
            f"The body is not a valid {kind.__name__}: {error}",
            param=match["path"] or None if match else None,
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}") from error


def add_error_handlers(app: FastAPI) -> None:
    """Answer every failure with the envelope: our own, the router's, and bugs."""

    @app.exception_handler(RemoeError)
    async def render(request: Request, error: RemoeError) -> Response:
        if error.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.error("request_failed", path=request.url.path, error=error.message)
        response = json_response(error.envelope(), error.status)
        if error.retry_after_s is not None:
            response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        return response

    @app.exception_handler(HTTPException)
    async def render_routing(request: Request, error: HTTPException) -> Response:
        envelope = InvalidRequestError(
            f"{request.method} {request.url.path}: {error.detail}."
        ).envelope()
        return Response(
            _encoder.encode(envelope),
            status_code=error.status_code,
            headers=error.headers,
            media_type="application/json",
        )

    @app.exception_handler(Exception)
    async def render_bug(request: Request, error: Exception) -> Response:
        _log.error("bug", path=request.url.path, exc_info=error)
        wrapped = InternalError("The planner failed; its log has the details.")
        return json_response(wrapped.envelope(), wrapped.status)
