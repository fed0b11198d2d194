"""At the door: the key, its limits and its budget, before a request is even read."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.books import Books
from gateway.errors import error_response
from gateway.events import Trace
from gateway.key_ring import Caller
from gateway.limits import TokenBucket, reset_text
from remoe.accounts.writer import LedgerUnavailableError
from remoe.errors import AuthenticationError, PermissionDeniedError, RemoeError

__all__ = ["Access", "check_model_allowed"]

# What anybody may see: this process's health, its metrics, its schema, and the page's own files.
_OPEN = frozenset({"/", "/healthz", "/readyz", "/metrics", "/openapi.json"})
_OPEN_FOLDER = "/static/"
_LIMITED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})


class Access:
    """ASGI middleware. `required` refuses whoever has no key; else a key given is still honoured,
    and any other text is taken for the "none" that clients must send something for."""

    def __init__(self, app: ASGIApp, *, books: Books, required: bool) -> None:
        self._app = app
        self._books = books
        self._required = required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if scope["type"] != "http" or path in _OPEN or path.startswith(_OPEN_FOLDER):
            await self._app(scope, receive, send)
            return
        trace: Trace = scope["state"]["trace"]
        try:
            caller = await self._identify(Headers(scope=scope))
            scope["state"]["caller"] = caller
            trace.key_id = caller.key.id if caller else None
            limited = scope["method"] == "POST" and path in _LIMITED
            if limited:
                self._check_books()
                if caller is not None:
                    caller.admit(self._books.wall_clock())
        except RemoeError as error:
            trace.error_code = error.code
            await error_response(error)(scope, receive, send)
            return
        if not limited or caller is None:
            await self._app(scope, receive, send)
            return

        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_limits(MutableHeaders(scope=message), caller)
            await send(message)

        await self._app(scope, receive, send_limits)

    async def _identify(self, headers: Headers) -> Caller | None:
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
        caller = await self._books.find(secret) if secret else None
        if caller is None and self._required:
            raise AuthenticationError(
                "Incorrect API key provided. Make one with `remoe key create`."
                if secret
                else "You didn't provide an API key. Provide it in an Authorization header with "
                "Bearer auth (Authorization: Bearer YOUR_KEY)."
            )
        return caller

    def _check_books(self) -> None:
        if self._books.refuses:
            raise LedgerUnavailableError(
                "The server cannot write its ledger at the moment, so it takes no requests. Try "
                "again in a little while.",
                retry_after_s=30,
            )


def check_model_allowed(caller: Caller | None, model: str) -> None:
    """Raise PermissionDeniedError if the key may not use the model."""
    if caller is not None and not caller.key.may_use(model):
        raise PermissionDeniedError(
            f"The key '{caller.key.name}' may not use the model '{model}'. GET /v1/models lists "
            "those it may use.",
            param="model",
        )


def _add_limits(headers: MutableHeaders, caller: Caller) -> None:
    for name, bucket in (("requests", caller.requests), ("tokens", caller.tokens)):
        if isinstance(bucket, TokenBucket):
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining)
            headers[f"x-ratelimit-reset-{name}"] = reset_text(bucket.reset_s)
