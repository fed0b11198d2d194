"""The one place where errors become replies: OpenAI's envelope, whatever went wrong."""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.events import Trace
from remoe.errors import InternalError, RemoeError

__all__ = [
    "MethodNotAllowedError",
    "UnknownPathError",
    "error_response",
    "internal_error",
    "on_http_exception",
    "on_remoe_error",
]


class UnknownPathError(RemoeError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowedError(RemoeError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_supported"


def internal_error() -> InternalError:
    """For failures nobody foresaw; what happened is in the log and stays there."""
    return InternalError(
        "The server failed on this request, and logged why under the id in the x-request-id "
        "header. Sending it again may work."
    )


def error_response(error: RemoeError) -> Response:
    """Render an error, with the headers OpenAI's clients look at before they try again."""
    headers = {}
    if error.retryable:
        seconds = error.retry_after_s if error.retry_after_s is not None else 5
        headers["retry-after"] = str(max(1, round(seconds)))
        headers["retry-after-ms"] = str(round(seconds * 1e3))
        headers["x-should-retry"] = "true"
    elif error.status >= 500 or error.status == 429:
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in {408, 413}:
        # The rest of the body is not read, so the connection cannot be used again.
        headers["connection"] = "close"
    return Response(
        msgspec.json.encode(error.envelope()),
        status_code=error.status,
        headers=headers,
        media_type="application/json",
    )


async def on_remoe_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RemoeError):
        raise error
    trace: Trace = request.state.trace
    trace.error_code = error.code
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    if not isinstance(error, HTTPException):
        raise error
    asked = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        response = error_response(
            MethodNotAllowedError(f"Not allowed: {asked}. Use {allowed} on this path.")
        )
        response.headers["allow"] = allowed
        return response
    return error_response(
        UnknownPathError(
            f"Unknown request URL: {asked}. This server has POST /v1/chat/completions, "
            "POST /v1/completions, POST /v1/responses, POST /tokenize, POST /detokenize, GET /v1/models and "
            "GET /metrics."
        )
    )
