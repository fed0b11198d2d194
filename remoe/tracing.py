"""Traces across services: W3C traceparent always passed on, spans exported where OpenTelemetry is on.

Spans are made only if OTEL_EXPORTER_OTLP_ENDPOINT (or its _TRACES_ form) is set; the SDK is not
even imported otherwise. Its own variables (OTEL_TRACES_SAMPLER, ...) hold. Names of generation
attributes are OpenTelemetry's for generative AI.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import structlog

from remoe.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry import trace as otel

__all__ = [
    "QUIET_PATHS",
    "Attributes",
    "Span",
    "TraceRequests",
    "current_span",
    "outgoing_headers",
    "server_span",
    "tracing",
]

Attributes = Mapping[str, "str | int | float | bool | None"]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_REQUEST_ID = "x-request-id"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})

_tracer: otel.Tracer | None = None
_span: ContextVar[Span | None] = ContextVar("remoe_span", default=None)
_request_id: ContextVar[str | None] = ContextVar("remoe_request_id", default=None)


class Span:
    """One piece of work. Without an exporter it only carries the caller's traceparent on."""

    def __init__(self, traceparent: str | None, inner: otel.Span | None = None) -> None:
        self.traceparent = traceparent
        self._inner = inner

    @property
    def trace_id(self) -> str | None:
        found = _TRACEPARENT.fullmatch(self.traceparent or "")
        return found.group(1) if found else None

    def child(self, name: str, attributes: Attributes | None = None) -> Span:
        """A call to another service; end it."""
        if self._inner is None:
            return self
        return _start(name, "CLIENT", self._inner, attributes)

    def add_timed(
        self, name: str, *, began_s: float, ended_s: float, attributes: Attributes | None = None
    ) -> None:
        """Add a part of this work that is over; times are Unix seconds."""
        if self._inner is not None:
            _start(name, "INTERNAL", self._inner, attributes, began_s=began_s).end(ended_s)

    def set(self, attributes: Attributes) -> None:
        """Set what is known; None is left out."""
        if self._inner is not None:
            self._inner.set_attributes(_known(attributes))

    def fail(self, kind: str) -> None:
        """Say that the work failed; `kind` is an error code of ours."""
        if self._inner is not None:
            from opentelemetry.trace import Status, StatusCode

            self._inner.set_attribute("error.type", kind)
            self._inner.set_status(Status(StatusCode.ERROR, kind))

    def rename(self, name: str) -> None:
        if self._inner is not None:
            self._inner.update_name(name)

    def end(self, at_s: float | None = None) -> None:
        """End it now, or at a Unix time."""
        if self._inner is not None:
            self._inner.end(None if at_s is None else round(at_s * 1e9))


_NOWHERE = Span(None)


@contextmanager
def tracing(service: str) -> Iterator[None]:
    """Export spans inside this block if an endpoint is set; what is left is sent at its end.

    The service is named `remoe-<service>`. Raises SettingsError if the SDK is not installed.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{_ENDPOINTS[0]} asks for traces: install `remoe[traces]`, or unset it"
        ) from error
    global _tracer  # noqa: PLW0603  # one exporter a process, as logging has
    provider = TracerProvider(resource=Resource.create({"service.name": f"remoe-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("remoe")
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()


def current_span() -> Span:
    """The span of the request this task works for."""
    return _span.get() or _NOWHERE


def outgoing_headers(span: Span | None = None) -> dict[str, str]:
    """What a call to another service carries: the trace and the request's id."""
    traceparent = (span or current_span()).traceparent
    request_id = _request_id.get()
    return {
        **({"traceparent": traceparent} if traceparent else {}),
        **({_REQUEST_ID: request_id} if request_id else {}),
    }


@contextmanager
def server_span(
    name: str, traceparent: str | None, request_id: str | None, *, recorded: bool = True
) -> Iterator[Span]:
    """A request being answered; its logs carry the request's id and the trace's."""
    given = traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None
    span = (
        Span(given)
        if _tracer is None or not recorded
        else _start(name, "SERVER", _remote(given), None)
    )
    span_token, id_token = _span.set(span), _request_id.set(request_id)
    ids = {"request_id": request_id, "trace_id": span.trace_id}
    bound = structlog.contextvars.bind_contextvars(**{k: v for k, v in ids.items() if v})
    try:
        yield span
    finally:
        structlog.contextvars.reset_contextvars(**bound)
        _span.reset(span_token)
        _request_id.reset(id_token)
        span.end()


class TraceRequests:
    """ASGI middleware for the services behind the gateway. Health checks leave no trace."""

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        given = {
            name: headers[name].decode("latin-1")
            for name in ("traceparent", _REQUEST_ID)
            if name in headers
        }
        name = f"{scope['method']} {scope['path']}"
        with server_span(name, given.get("traceparent"), given.get(_REQUEST_ID)) as span:

            async def send_noting(message: _Message) -> None:
                if message["type"] == "http.response.start":
                    span.set({"http.response.status_code": message["status"]})
                    if message["status"] >= 500:
                        span.fail(str(message["status"]))
                await send(message)

            await self._app(scope, receive, send_noting)


def _start(
    name: str,
    kind: str,
    parent: otel.Span | None,
    attributes: Attributes | None,
    *,
    began_s: float | None = None,
) -> Span:
    from opentelemetry import trace

    assert _tracer is not None  # noqa: S101  # spans with an inner one come from it
    inner = _tracer.start_span(
        name,
        context=trace.set_span_in_context(parent) if parent is not None else None,
        kind=trace.SpanKind[kind],
        attributes=_known(attributes or {}),
        start_time=round((time.time() if began_s is None else began_s) * 1e9),
    )
    context = inner.get_span_context()
    flags = f"{int(context.trace_flags):02x}"
    return Span(f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags}", inner)


def _remote(traceparent: str | None) -> otel.Span | None:
    """The caller's span, as the parent of ours."""
    found = _TRACEPARENT.fullmatch(traceparent or "")
    if found is None:
        return None
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    assert traceparent is not None  # noqa: S101  # it matched
    return NonRecordingSpan(
        SpanContext(
            trace_id=int(found.group(1), 16),
            span_id=int(found.group(2), 16),
            is_remote=True,
            trace_flags=TraceFlags(int(traceparent[-2:], 16)),
        )
    )


def _known(attributes: Attributes) -> dict[str, str | int | float | bool]:
    return {name: value for name, value in attributes.items() if value is not None}
