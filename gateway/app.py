"""Wiring: routes to admission to answers, and the clients they share."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypedDict

import msgspec
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Lifespan

import remoe
from gateway.access import Access, check_model_allowed
from gateway.accounting import Accounting
from gateway.admission import Admission, Job
from gateway.answer import Answer
from gateway.background import Background
from gateway.books import Books
from gateway.config import GatewaySettings
from gateway.dashboard import Dashboard, RecentRequests
from gateway.deadline import timeout_s
from gateway.errors import on_http_exception, on_remoe_error
from gateway.generation import Services
from gateway.key_ring import Caller
from gateway.line import Line
from gateway.main_client import MainClient
from gateway.metrics import Metrics
from gateway.middleware import RequestTracing
from gateway.observers import log_request
from gateway.openapi import ERROR_RESPONSES, body_of, describe
from gateway.planner_client import PlannerClient
from gateway.pod_watch import ApiServer, pods_say
from gateway.prewarm import Prewarmer
from gateway.replies import Model, ModelList
from gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
)
from gateway.residency import ResidentMeter
from gateway.routes import DescribedRoute, ExactPaths
from gateway.runtime_watch import RuntimeWatch, Source, supervisor_says
from gateway.text import TextModel
from gateway.timings import Timings
from gateway.upstream import open_upstream
from gateway.validation import parse_body, read_body
from remoe.accounts.database import open_database
from remoe.errors import RemoeError, SettingsError
from remoe.prices import PriceBook
from remoe.topology import Topology

__all__ = ["create_app"]

_GARBAGE_SEARCHED_AT = 10_000  # new objects
_EXPOSED_HEADERS = [
    "retry-after",
    "x-request-id",
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
]


class _Application(FastAPI):
    """With our layers only: of FastAPI's own around them none does anything here, for each chunk."""

    def build_middleware_stack(self) -> ASGIApp:
        routes = ExactPaths(self.router, self.routes)
        app: ASGIApp = ExceptionMiddleware(routes, handlers=self.exception_handlers)
        for layer, args, kwargs in reversed(self.user_middleware):
            app = layer(app, *args, **kwargs)
        return app


class _State(TypedDict):
    services: Services


def create_app(settings: GatewaySettings, topology: Topology, *, public: bool = False) -> FastAPI:
    """Build the gateway; `public` says that more than loopback can reach it.

    Raises CheckpointError if the model's text files cannot be read, and SettingsError if the
    ledger or the price book cannot be used, or a public address would be open to everybody.
    """
    text = TextModel.load(Path(topology.model_dir))
    admission = Admission(topology.model, text, settings)
    keys_required = settings.auth == "required" or (settings.auth == "auto" and public)
    if keys_required and settings.ledger is None:
        raise SettingsError(
            "this address can be reached from other machines, and there are no keys: set "
            "REMOE_GATEWAY_LEDGER to a ledger that has some (`remoe key create`), or "
            "REMOE_GATEWAY_AUTH=off to let everybody in"
        )
    shared = _Shared.of(settings, topology)
    recent = RecentRequests()
    metrics = Metrics(books=shared.books, resident=shared.resident, watch=shared.watch)
    if keys_required and public and not shared.books.has_keys():
        raise SettingsError(
            "this address can be reached from other machines, and the ledger has no key yet: make "
            "one with `remoe key create NAME`, or set REMOE_GATEWAY_AUTH=off to let everybody in"
        )
    app = _Application(
        title="Remoe",
        version=remoe.__version__,
        lifespan=_lifespan(settings, topology, text, shared),
        docs_url=None,
        redoc_url=None,
        exception_handlers={RemoeError: on_remoe_error, HTTPException: on_http_exception},
        redirect_slashes=False,
        responses=ERROR_RESPONSES,
    )
    app.router.route_class = DescribedRoute
    # FastAPI's documented way to replace the document.
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    # The last one added is the first to see a request.
    app.add_middleware(Accounting, books=shared.books)
    app.add_middleware(Access, books=shared.books, required=keys_required)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.strip() for origin in settings.cors_origins.split(",")],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(RequestTracing, observers=(log_request, metrics.observe, recent.observe))
    _add_generation(app, admission, settings)
    _add_tokens(app, admission, settings)
    _add_models(app, admission, topology.model, text)
    _add_operations(app, metrics)
    Dashboard(
        model=topology.model,
        price_book=shared.prices.name,
        recent=recent,
        resident=shared.resident,
        watch=shared.watch,
    ).add_to(app)
    return app


class _Shared(NamedTuple):
    """What both the routes and the work behind them use."""

    prices: PriceBook
    resident: ResidentMeter
    watch: RuntimeWatch
    books: Books

    @classmethod
    def of(cls, settings: GatewaySettings, topology: Topology) -> _Shared:
        """Open the ledger too; raises SettingsError."""
        prices = settings.load_prices()
        resident = ResidentMeter(topology)
        books = Books(
            open_database(settings.ledger) if settings.ledger else None,
            model=topology.model,
            prices=prices,
            resident=resident,
            on_failure=settings.ledger_failure,
            patience_s=settings.ledger_patience_s,
        )
        watch = RuntimeWatch(_runtime(settings, topology), resident)
        return cls(prices, resident, watch, books)


def _runtime(settings: GatewaySettings, topology: Topology) -> Source | None:
    """Who knows the replicas: the supervisor, or the cluster this runs in."""
    if settings.runtime_control is not None:
        return supervisor_says(settings.runtime_control)
    server = ApiServer.of_this_pod(dict(os.environ))
    if server is None:
        return None
    return pods_say(server, model=topology.model, url=topology.gateway_url)


def _lifespan(
    settings: GatewaySettings, topology: Topology, text: TextModel, shared: _Shared
) -> Lifespan[FastAPI]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[_State]:
        background = Background()
        shared.watch.start()
        # What is there by now stays: to look through it for garbage would hold streams up. Of
        # what a request makes, little is garbage that only a search finds.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GARBAGE_SEARCHED_AT)
        timings = Timings()
        line = Line(settings.max_open, timings)
        async with (
            shared.books.opened(),
            open_upstream() as http,
            open_upstream(fresh=True) as fresh,
        ):
            planner = PlannerClient(http, topology.planner_url, timeout_s=settings.plan_timeout_s)
            yield {
                "services": Services(
                    text=text,
                    planner=planner,
                    prewarmer=Prewarmer(
                        http,
                        {expert.name: expert.url for expert in topology.experts},
                        background,
                        # MoEless' policies wake functions themselves, once the main function runs.
                        wanted=lambda: (
                            settings.policy == "remoe"
                            or not shared.watch.is_ready(topology.main_url)
                        ),
                    ),
                    main=MainClient(
                        http,
                        fresh,
                        topology.main_url,
                        line=line,
                        timings=timings,
                        ready_for_s=lambda: shared.watch.ready_for_s(topology.main_url),
                        cold_start_timeout_s=settings.cold_start_timeout_s,
                        silence_timeout_s=settings.silence_timeout_s,
                        stall_timeout_s=settings.stall_timeout_s,
                    ),
                    prices=shared.prices,
                    resident=shared.resident,
                    line=line,
                    timings=timings,
                    joint=settings.policy == "joint",
                )
            }
            await asyncio.gather(background.close(), planner.close())
            await shared.watch.close()

    return lifespan


def _add_generation(app: FastAPI, admission: Admission, settings: GatewaySettings) -> None:
    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, settings.max_body_bytes)
        checked = parse_body(body, ChatRequest)
        limit_s = timeout_s(request.headers, stream=checked.stream)
        return _answer(request, await admission.chat(checked, timeout_s=limit_s))

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read_body(request, settings.max_body_bytes)
        checked = parse_body(body, CompletionRequest)
        limit_s = timeout_s(request.headers, stream=checked.stream)
        return _answer(request, await admission.completion(checked, timeout_s=limit_s))

    @app.post("/v1/responses", openapi_extra=body_of(ResponseRequest))
    async def responses(request: Request) -> Response:
        body = await read_body(request, settings.max_body_bytes)
        checked = parse_body(body, ResponseRequest)
        limit_s = timeout_s(request.headers, stream=checked.stream)
        return _answer(request, await admission.response(checked, timeout_s=limit_s))

    def _answer(request: Request, job: Job) -> Answer:
        check_model_allowed(request.state.caller, job.model)
        return Answer(
            job,
            request.state.services,
            request.state.trace,
            heartbeat_s=settings.heartbeat_s,
        )


def _add_tokens(app: FastAPI, admission: Admission, settings: GatewaySettings) -> None:
    """vLLM's routes; they need no model and wake nothing."""

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, settings.max_body_bytes)
        return _json(await admission.tokenize(parse_body(body, TokenizeRequest)))

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, settings.max_body_bytes)
        return _json(admission.detokenize(parse_body(body, DetokenizeRequest)))


def _add_models(app: FastAPI, admission: Admission, name: str, text: TextModel) -> None:
    async def model(request: Request) -> Model:
        services: Services = request.state.services
        return Model(
            id=name,
            created=text.created,
            max_model_len=text.context_length,
            state="starting" if services.line.cold else await services.planner.model_state(),
        )

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        caller: Caller | None = request.state.caller
        allowed = caller is None or caller.key.may_use(name)
        return _json(ModelList(data=[await model(request)] if allowed else []))

    @app.get("/v1/models/{model_id:path}")  # noqa: FAST003  # as a parameter it could fail with 422
    async def one_model(request: Request) -> Response:
        admission.check_model(request.path_params["model_id"])
        check_model_allowed(request.state.caller, name)
        return _json(await model(request))


def _add_operations(app: FastAPI, metrics: Metrics) -> None:
    """Health looks at this process alone: a check must never wake a function."""

    @app.get("/healthz")
    async def healthz(_: Request) -> Response:
        return _json({"status": "alive"})

    @app.get("/readyz")
    async def readyz(_: Request) -> Response:
        # The tokenizer was loaded before the socket was bound.
        return _json({"status": "ready"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics_page(_: Request) -> Response:
        return Response(metrics.render(), headers={"content-type": metrics.content_type})


def _json(value: msgspec.Struct | dict[str, str]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
