"""The page at `/` and what it asks for: functions, recent requests, and why a plan was made."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from fastapi import FastAPI, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

import remoe
from gateway.events import RequestFinished
from gateway.key_ring import Caller
from gateway.receipt import Receipt
from gateway.residency import ResidentMeter
from gateway.runtime_watch import RuntimeWatch
from remoe.balance_report import BalanceReport
from remoe.errors import NotFoundError
from remoe.generation import GenerationStats
from remoe.moeless.function_balance import Policy
from remoe.plan import FunctionForecast, Neighbour, Plan
from remoe.runtime_status import FunctionStatus

__all__ = ["Dashboard", "RecentRequests"]

_STATIC = Path(__file__).parent / "static"
_KEPT = 300
# Plans of large models are large: only so many keep theirs.
_KEPT_PLANS = 40
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; style-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class RecentRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list; no text of anybody's is kept."""

    id: str
    at: float
    key_id: str | None
    status: int
    prompt_tokens: int
    completion_tokens: int
    receipt: Receipt


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why the plan was as it was, and what came. Profiles are [layers][experts], rows sum to 1."""

    id: str
    plan_id: str
    remote: tuple[tuple[int, ...], ...]
    predicted: list[list[float]]
    actual: list[list[float]] | None
    neighbours: list[Neighbour]
    functions: list[FunctionForecast]
    policy: Policy | None


class State(msgspec.Struct, frozen=True, kw_only=True):
    """`functions` is null where no local runtime tells of them, `balance` where the policy is `remoe`;
    it is as of the last answer."""

    version: str
    model: str
    price_book: str
    open_requests: int
    functions: list[FunctionStatus] | None
    balance: BalanceReport | None


class RecentRequests:
    """Remembers the latest generation requests; an observer of the gateway's events."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._requests: deque[RecentRequest] = deque(maxlen=_KEPT)
        self._plans: dict[str, tuple[Plan, GenerationStats | None]] = {}
        self.balance: BalanceReport | None = None

    def observe(self, event: RequestFinished) -> None:
        trace = event.trace
        if trace.receipt is None or trace.reply_id is None:
            return
        self._requests.append(
            RecentRequest(
                id=trace.reply_id,
                at=self._wall_clock(),
                key_id=trace.key_id,
                status=trace.status,
                prompt_tokens=trace.prompt_tokens,
                completion_tokens=trace.completion_tokens,
                receipt=trace.receipt,
            )
        )
        stats = trace.records[0].stats if trace.records else None
        if stats is not None and stats.balance is not None:
            self.balance = stats.balance
        if trace.plan is None:
            return
        self._plans[trace.reply_id] = (trace.plan, stats)
        if len(self._plans) > _KEPT_PLANS:
            del self._plans[next(iter(self._plans))]

    def visible(self, caller: Caller | None) -> list[RecentRequest]:
        """The latest first; with a key, that key's own."""
        mine = None if caller is None else caller.key.id
        return [r for r in reversed(self._requests) if mine is None or r.key_id == mine]

    def explanation(self, reply_id: str, caller: Caller | None) -> Explanation:
        """Raises NotFoundError for a request that is not known, or is somebody else's."""
        found = self._plans.get(reply_id)
        if found is None or all(r.id != reply_id for r in self.visible(caller)):
            raise NotFoundError("This request is not known any more, or had no plan.")
        plan, stats = found
        return Explanation(
            id=reply_id,
            plan_id=plan.plan_id,
            remote=plan.partition.remote,
            predicted=plan.profile,
            actual=None if stats is None else _shares(stats.prefill_counts, stats.decode_counts),
            neighbours=plan.neighbours,
            functions=plan.functions,
            policy=plan.policy,
        )


class Dashboard:
    """Adds the page's routes."""

    def __init__(
        self,
        *,
        model: str,
        price_book: str,
        recent: RecentRequests,
        resident: ResidentMeter,
        watch: RuntimeWatch,
    ) -> None:
        self._model = model
        self._price_book = price_book
        self._recent = recent
        self._resident = resident
        self._watch = watch

    def add_to(self, app: FastAPI) -> None:
        app.mount("/static", StaticFiles(directory=_STATIC), name="static")

        @app.get("/", include_in_schema=False)
        async def page(request: Request) -> Response:
            if "text/html" in request.headers.get("accept", ""):
                return FileResponse(_STATIC / "index.html", headers=_HEADERS)
            return _json(
                {
                    "name": "remoe",
                    "version": remoe.__version__,
                    "model": self._model,
                    "links": ["/v1/models", "/openapi.json", "/metrics", "/healthz", "/readyz"],
                }
            )

        @app.get("/dashboard/state", include_in_schema=False)
        async def state(_: Request) -> Response:
            latest = self._watch.latest
            return _json(
                State(
                    version=remoe.__version__,
                    model=self._model,
                    price_book=self._price_book,
                    open_requests=self._resident.requests,
                    functions=None if latest is None else latest.functions,
                    balance=self._recent.balance,
                )
            )

        @app.get("/dashboard/requests", include_in_schema=False)
        async def requests(request: Request) -> Response:
            return _json(self._recent.visible(request.state.caller))

        @app.get("/dashboard/requests/{reply_id}", include_in_schema=False)  # noqa: FAST003
        async def explanation(request: Request) -> Response:
            reply_id = request.path_params["reply_id"]
            return _json(self._recent.explanation(reply_id, request.state.caller))


def _shares(prefill: list[list[int]], decode: list[list[int]]) -> list[list[float]]:
    counts = np.add(prefill, decode, dtype=np.float64)  # [layers, experts]
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares: list[list[float]] = np.round(counts / totals, 4).tolist()
    return shares


def _json(value: object) -> Response:
    return Response(
        msgspec.json.encode(value),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )
