"""How long a client waits for its answer: by its own word, or by what its library says.

`x-remoe-timeout-s` counts from the request's arrival to the last byte of the answer. OpenAI's
clients send their own timeouts along: Python's as `x-stainless-read-timeout`, the longest silence
it accepts, and npm's as `x-stainless-timeout`, the time to the response's headers. For an answer
sent whole both are the time there is; a stream's heartbeats satisfy both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from remoe.errors import DeadlineError, InvalidRequestError

__all__ = ["TIMEOUT_HEADER", "MissedDeadlineError", "timeout_s"]

TIMEOUT_HEADER = "x-remoe-timeout-s"
_CLIENT_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")


class MissedDeadlineError(DeadlineError):
    """The client's own limit is over: asking again by itself would pay twice for no answer."""

    code = "deadline_exceeded"
    retryable = False

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"The answer was not complete within the {limit_s:g} s this client waits, so the work "
            "was cancelled. Ask for fewer tokens, stream the answer, or wait longer."
        )


def timeout_s(headers: Mapping[str, str], *, stream: bool) -> float | None:
    """The request's limit; None if it has none. Raises InvalidRequestError if it is no time."""
    given = headers.get(TIMEOUT_HEADER)
    if given is not None:
        value = _seconds(given)
        if value is None:
            raise InvalidRequestError(
                f"The header '{TIMEOUT_HEADER}' must be a positive number of seconds, "
                f"not {given[:40]!r}.",
                param=TIMEOUT_HEADER,
            )
        return value
    if stream:
        return None
    limits = [_seconds(headers.get(name, "")) for name in _CLIENT_HEADERS]
    return min((limit for limit in limits if limit is not None), default=None)


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
