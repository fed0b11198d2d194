"""Nothing is finished until it is written down: the last byte waits for the ledger."""

from __future__ import annotations

import contextlib

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.books import Books
from gateway.errors import error_response
from gateway.events import CLIENT_GONE, Trace
from gateway.receipt import Receipt
from remoe.accounts.entries import ANONYMOUS, Entry, Outcome, day_of
from remoe.accounts.writer import LedgerUnavailableError
from remoe.money import kb_s

__all__ = ["Accounting", "entry_of"]

_NANO = 1_000_000_000


class Accounting:
    """ASGI middleware: records a request whose trace has a receipt before its answer's last part.

    If that cannot be done, the answer is not given: a 503 instead of a whole reply, an error
    event instead of a stream's [DONE].
    """

    def __init__(self, app: ASGIApp, *, books: Books) -> None:
        self._app = app
        self._books = books

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace: Trace = scope["state"]["trace"]
        answer = _Answer(self._books, trace, scope, receive, send)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            await answer.record_unfinished()


class _Answer:
    """One answer on its way out; its head waits for the first part of its body."""

    def __init__(
        self, books: Books, trace: Trace, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._books = books
        self._trace = trace
        self._scope = scope
        self._receive = receive
        self._send = send
        self._head: Message | None = None
        self._begun = False
        self._settled = False
        self._given_up = False

    async def send(self, message: Message) -> None:
        if self._given_up:
            return
        if message["type"] == "http.response.start":
            self._head = message
            return
        trace = self._trace
        last = not message.get("more_body", False)
        if last and trace.receipt is not None and trace.error_code is None and not self._settled:
            self._settled = True
            try:
                await self._books.record(self._entry(trace.receipt, "finished"))
            except LedgerUnavailableError as error:
                await self._give_up(error)
                return
        if self._head is not None and not self._begun:
            self._begun = True
            await self._send(self._head)
        await self._send(message)

    async def record_unfinished(self) -> None:
        """What a request used before it failed or its client left is written down too."""
        trace = self._trace
        if self._settled or trace.receipt is None:
            return
        self._settled = True
        if trace.completion_tokens or trace.receipt.cost_usd:
            outcome: Outcome = "cancelled" if trace.status == CLIENT_GONE else "failed"
            with contextlib.suppress(LedgerUnavailableError):
                await self._books.record(self._entry(trace.receipt, outcome))

    async def _give_up(self, error: LedgerUnavailableError) -> None:
        self._given_up = True
        self._trace.error_code = error.code
        if self._begun:
            event = b"data: %b\n\n" % msgspec.json.encode(error.envelope())
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            await error_response(error)(self._scope, self._receive, self._send)

    def _entry(self, receipt: Receipt, outcome: Outcome) -> Entry:
        return entry_of(self._trace, receipt, outcome, self._books.wall_clock())


def entry_of(trace: Trace, receipt: Receipt, outcome: Outcome, unix_s: float) -> Entry:
    """The ledger's row; the receipt's amounts are decimals that stand for whole numbers exactly."""
    cost, resident, predicted = receipt.cost, receipt.resident, receipt.predicted
    return Entry(
        id=trace.reply_id or trace.request_id,
        request_id=trace.request_id,
        finished_at_us=round(unix_s * 1e6),
        day=day_of(unix_s),
        key_id=trace.key_id or ANONYMOUS,
        model=trace.model or "",
        outcome=outcome,
        prompt_tokens=trace.prompt_tokens,
        completion_tokens=trace.completion_tokens,
        plan_id=receipt.plan_id,
        deployment_plan_id=receipt.deployment_plan_id,
        price_book=receipt.price_book,
        metered=cost is not None,
        main_gpu_kb_s=kb_s(receipt.main_gpu_gb_s or 0.0),
        main_cpu_kb_s=kb_s(receipt.main_cpu_gb_s or 0.0),
        remote_kb_s=kb_s(receipt.remote_gb_s or 0.0),
        main_gpu_nano_usd=_nano(cost.main_gpu_usd) if cost else 0,
        main_cpu_nano_usd=_nano(cost.main_cpu_usd) if cost else 0,
        remote_nano_usd=_nano(cost.remote_usd) if cost else 0,
        total_nano_usd=_nano(receipt.cost_usd or 0.0),
        resident_kb_s=kb_s(resident.gb_s) if resident else None,
        resident_starting_kb_s=kb_s(resident.starting_gb_s) if resident else None,
        resident_nano_usd=_nano_or_none(resident.cost_usd) if resident else None,
        remote_calls=receipt.remote_calls,
        remote_bytes=receipt.remote_bytes,
        local_fallbacks=receipt.local_fallbacks,
        ttft_us=_us(receipt.ttft_ms),
        tpot_us=_us(receipt.tpot_ms),
        total_us=round(receipt.total_ms * 1e3),
        main_cold_start_us=round(receipt.cold_start.main_ms * 1e3),
        experts_cold_start_us=round(receipt.cold_start.experts_ms * 1e3),
        predicted_ttft_us=_us(predicted.ttft_ms),
        predicted_tpot_us=_us(predicted.tpot_ms),
        predicted_nano_usd=_nano_or_none(predicted.cost_usd),
    )


def _nano(usd: float) -> int:
    return round(usd * _NANO)


def _nano_or_none(usd: float | None) -> int | None:
    return None if usd is None else _nano(usd)


def _us(milliseconds: float | None) -> int | None:
    return None if milliseconds is None else round(milliseconds * 1e3)
