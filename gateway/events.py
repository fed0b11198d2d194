"""What the gateway tells its observers; adapters turn it into metrics and log lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.receipt import ChoiceRecord, Receipt
from remoe.plan import Plan

__all__ = ["CLIENT_GONE", "Observer", "RequestFinished", "Trace"]

# nginx's status for a client that left before its answer: no reply carries it.
CLIENT_GONE = 499


@dataclass(slots=True)
class Trace:
    """What the handler of one HTTP request notes down on the way.

    `plan` is the one for the first prompt, `records` what was measured of each choice.
    """

    request_id: str
    received_at: float
    key_id: str | None = None
    reply_id: str | None = None
    model: str | None = None
    route: str = "other"
    status: int = 0
    streamed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error_code: str | None = None
    receipt: Receipt | None = None
    plan: Plan | None = None
    records: Sequence[ChoiceRecord] = ()


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """One HTTP request is over. `status` is what the log should say, 499 if the client left."""

    trace: Trace
    elapsed_s: float


Observer = Callable[[RequestFinished], None]
