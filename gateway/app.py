"""Wiring: routes to admission to answers, and the clients they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypedDict

import aiohttp
import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Lifespan

import remoe
from gateway.admission import Admission, Job
from gateway.answer import Answer
from gateway.background import Background
from gateway.config import GatewaySettings
from gateway.deadline import timeout_s
from gateway.errors import on_http_exception, on_remoe_error
from gateway.generation import Services
from gateway.line import Line
from gateway.main_client import MainClient
from gateway.middleware import RequestTracing
from gateway.observers import Metrics, log_request
from gateway.openapi import ERROR_RESPONSES, body_of, describe
from gateway.planner_client import PlannerClient
from gateway.prewarm import Prewarmer
from gateway.replies import Model, ModelList
from gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from gateway.text import TextModel
from gateway.timings import Timings
from gateway.validation import parse_body, read_body
from remoe.errors import RemoeError
from remoe.prices import DEFAULT_PRICES
from remoe.topology import Topology

__all__ = ["create_app"]

# Functions behind us keep idle connections longer (75 s), so we close first.
_KEEP_ALIVE_S = 30
_MOST_CONNECTIONS = 2048


class _State(TypedDict):
    services: Services


def create_app(settings: GatewaySettings, topology: Topology) -> FastAPI:
    """Build the gateway; raises CheckpointError if the model's text files cannot be read."""
    text = TextModel.load(Path(topology.model_dir))
    admission = Admission(topology.model, text, settings)
    metrics = Metrics()
    app = FastAPI(
        title="Remoe",
        version=remoe.__version__,
        lifespan=_lifespan(settings, topology, text),
        docs_url=None,
        redoc_url=None,
        exception_handlers={RemoeError: on_remoe_error, HTTPException: on_http_exception},
        redirect_slashes=False,
        responses=ERROR_RESPONSES,
    )
    # FastAPI's documented way to replace the document.
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.add_middleware(RequestTracing, observers=(log_request, metrics.observe))
    _add_generation(app, admission, settings)
    _add_tokens(app, admission, settings)
    _add_models(app, admission, topology.model, text)
    _add_operations(app, metrics, topology.model)
    return app


def _lifespan(settings: GatewaySettings, topology: Topology, text: TextModel) -> Lifespan[FastAPI]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[_State]:
        background = Background()
        timings = Timings()
        line = Line(settings.max_open, timings)
        # Time is limited where it is known what for; a cold start may well take minutes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=_MOST_CONNECTIONS, keepalive_timeout=_KEEP_ALIVE_S)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, auto_decompress=False
        ) as http:
            yield {
                "services": Services(
                    text=text,
                    planner=PlannerClient(
                        http,
                        topology.planner_url,
                        background,
                        timeout_s=settings.plan_timeout_s,
                    ),
                    prewarmer=Prewarmer(
                        http, {expert.name: expert.url for expert in topology.experts}, background
                    ),
                    main=MainClient(
                        http,
                        topology.main_url,
                        line=line,
                        timings=timings,
                        cold_start_timeout_s=settings.cold_start_timeout_s,
                        stall_timeout_s=settings.stall_timeout_s,
                    ),
                    prices=DEFAULT_PRICES,
                    line=line,
                    timings=timings,
                )
            }
            await background.close()

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

    def _answer(request: Request, job: Job) -> Answer:
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
        return _json(ModelList(data=[await model(request)]))

    @app.get("/v1/models/{model_id:path}")  # noqa: FAST003  # as a parameter it could fail with 422
    async def one_model(request: Request) -> Response:
        admission.check_model(request.path_params["model_id"])
        return _json(await model(request))


def _add_operations(app: FastAPI, metrics: Metrics, model: str) -> None:
    """Health looks at this process alone: a check must never wake a function."""

    @app.get("/", include_in_schema=False)
    async def hello() -> dict[str, object]:
        return {
            "name": "remoe",
            "version": remoe.__version__,
            "model": model,
            "links": ["/v1/models", "/openapi.json", "/metrics", "/healthz", "/readyz"],
        }

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        # The tokenizer was loaded before the socket was bound.
        return {"status": "ready"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics_page() -> Response:
        return Response(metrics.render(), headers={"content-type": metrics.content_type})


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
