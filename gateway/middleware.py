"""Around every HTTP request: its id, its log context, its one event, and the last resort."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import error_response, internal_error
from gateway.events import Observer, RequestFinished, Trace
from gateway.span_attributes import describe_request
from remoe.tracing import QUIET_PATHS, server_span

__all__ = ["RequestTracing"]

_log = structlog.get_logger()
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestTracing:
    """Puts a `Trace` into the request's state and reports it when the request is over."""

    def __init__(self, app: ASGIApp, observers: Sequence[Observer]) -> None:
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        trace = Trace(
            request_id=given if _SANE_ID.fullmatch(given) else secrets.token_hex(16),
            received_at=time.perf_counter(),
        )
        scope.setdefault("state", {})["trace"] = trace

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                ours = (b"x-request-id", trace.request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), ours]}
            await send(message)

        quiet = scope["path"] in QUIET_PATHS
        with server_span(
            scope["method"], headers.get("traceparent"), trace.request_id, recorded=not quiet
        ) as span:
            try:
                await self._app(scope, receive, send_traced)
            except Exception:  # noqa: BLE001  # the last resort, logged in full
                _log.exception("request failed")
                trace.error_code = "internal_error"
                if not trace.status:
                    await error_response(internal_error())(scope, receive, send_traced)
            finally:
                route = scope.get("route")
                trace.route = getattr(route, "path", "other")
                describe_request(span, trace)
                event = RequestFinished(trace, time.perf_counter() - trace.received_at)
                for observer in self._observers:
                    observer(event)
