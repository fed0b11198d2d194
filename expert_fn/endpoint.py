"""What an expert function answers to a parsed request, whatever carried it."""

from __future__ import annotations

import hmac
import logging
import os
import socket
import time
from http import HTTPStatus
from typing import NamedTuple, Protocol

import httptools
import msgspec

from expert_fn.compute import RefusedCallError
from remoe.expert_call import (
    CONTENT_TYPE,
    MAX_BODY_BYTES,
    PATH,
    TOKEN_VARIABLE,
    ExpertCall,
    ExpertFailure,
    ExpertReply,
    FailureCode,
    bearer,
)
from remoe.kernel.idle_polling import IdlePolling
from remoe.lifecycle import REPLICA_HEADER, Notifier

__all__ = ["Computer", "Endpoint", "Response"]

_log = logging.getLogger(__name__)
_PATH = PATH.encode()
_OK = HTTPStatus.OK
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ExpertCall)
_STATUS: dict[FailureCode, HTTPStatus] = {
    "wrong_model": HTTPStatus.CONFLICT,
    "wrong_shape": HTTPStatus.BAD_REQUEST,
    "unknown_expert": HTTPStatus.NOT_FOUND,
    "body_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "malformed": HTTPStatus.BAD_REQUEST,
    "unauthorized": HTTPStatus.UNAUTHORIZED,
    "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
}


class Computer(Protocol):
    def compute(self, call: ExpertCall) -> bytes:
        """The answer to a call, float32 [rows, hidden]; raises RefusedCallError."""
        ...


class Response(NamedTuple):
    status: HTTPStatus
    body: bytes
    content_type: str = CONTENT_TYPE


class Endpoint:
    """Routes a request; `payload_limit_bytes` holds for its body and for the reply's.

    With a `token`, calls must carry it as a bearer token; health checks need none. `replica` tells
    this process from others behind the same address. `polling` stays awake for callers nearby.
    """

    def __init__(
        self,
        computer: Computer,
        notifier: Notifier,
        *,
        payload_limit_bytes: int = MAX_BODY_BYTES,
        token: str = "",
    ) -> None:
        self._computer = computer
        self._credentials = bearer(token).encode() if token else b""
        self._notifier = notifier
        self.payload_limit_bytes = payload_limit_bytes
        self.replica = f"{socket.gethostname()}-{os.getpid()}"
        self.polling = IdlePolling()
        self._answer_head = self._head(Response(_OK, b""))

    @property
    def asks_for_credentials(self) -> bool:
        return bool(self._credentials)

    def handle(self, method: bytes, url: bytes, body: bytes, credentials: bytes = b"") -> Response:
        """Answer a request whose body is within the limit; never raises.

        `credentials` is its Authorization header.
        """
        path = _PATH if url == _PATH else httptools.parse_url(url).path
        if path == _PATH:
            if self._credentials and not hmac.compare_digest(self._credentials, credentials):
                return _failure("unauthorized", f"calls need the token of {TOKEN_VARIABLE}")
            if method == b"POST":
                return self._answer(body)
            return _failure("malformed", "use POST", HTTPStatus.METHOD_NOT_ALLOWED)
        if path in {b"/healthz", b"/readyz"}:
            return Response(_OK, b"ok\n", "text/plain")
        return _failure("malformed", f"no such path; calls go to {PATH}", HTTPStatus.NOT_FOUND)

    def refuse_body(self, size_bytes: int) -> Response:
        return _failure("body_too_large", self._too_large(size_bytes))

    def refuse_syntax(self) -> Response:
        return _failure("malformed", "this is not HTTP/1.1")

    def head(self, response: Response) -> bytes:
        """A response's head, but for its length and what ends it."""
        if response.status is _OK and response.content_type is CONTENT_TYPE:
            return self._answer_head
        return self._head(response)

    def _head(self, response: Response) -> bytes:
        status = response.status
        return (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            f"content-type: {response.content_type}\r\n"
            f"{REPLICA_HEADER}: {self.replica}\r\n"
        ).encode()

    def _answer(self, body: bytes) -> Response:
        try:
            return self._compute(_decoder.decode(body))
        except msgspec.DecodeError as error:
            return _failure("malformed", f"the body is not an expert call: {error}")
        except RefusedCallError as error:
            _log.warning("expert_call_refused", extra={"code": error.code, "reason": error.message})
            return _failure(error.code, error.message)
        except Exception:  # noqa: BLE001  # a bug costs this call, not the function
            _log.exception("expert_call_failed")
            return _failure("internal", "the function failed; its log says why")

    def _compute(self, call: ExpertCall) -> Response:
        began = time.monotonic()
        partial = self._computer.compute(call)
        ended = time.monotonic()
        if call.near:
            self.polling.stay_awake(ended)  # whoever decodes calls again soon
        reply = ExpertReply(
            partial=partial,
            busy_s=ended - began,
            ready_for_s=self._notifier.ready_for_s,
        )
        body = _encoder.encode(reply)
        if len(body) > self.payload_limit_bytes:
            raise RefusedCallError(
                "body_too_large", "the reply would have " + self._too_large(len(body))
            )
        return Response(_OK, body)

    def _too_large(self, size_bytes: int) -> str:
        return (
            f"{size_bytes} bytes; the limit is {self.payload_limit_bytes} each way: send fewer rows "
            "(REMOE_MAIN_PAYLOAD_LIMIT_BYTES) or raise REMOE_EXPERT_PAYLOAD_LIMIT_BYTES"
        )


def _failure(code: FailureCode, message: str, status: HTTPStatus | None = None) -> Response:
    body = _encoder.encode(ExpertFailure(code=code, message=message))
    return Response(status or _STATUS[code], body)
