"""Wire the main-model function: claim a deployment, load it, serve `/v1/generate`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from main_model_fn.choose_device import choose_device, hot_budget
from main_model_fn.config import MainSettings
from main_model_fn.deployment import claim_deployment, release_deployment
from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.generation_spans import trace_generation
from main_model_fn.gpu_memory import GpuMemory
from main_model_fn.guide import Guides
from main_model_fn.http_transport import HttpTransport
from main_model_fn.in_process_transport import InProcessTransport
from main_model_fn.live_partition import LivePartition
from main_model_fn.metering import StepMeter
from main_model_fn.native_threads import open_pool
from main_model_fn.served_model import load_served_model
from main_model_fn.transport import ExpertTransport
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError, InvalidRequestError, RemoeError
from remoe.generation import GenerateEvent, GenerateRequest
from remoe.kernel.interface import ExpertKernel
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool
from remoe.kernel.numpy_kernel import NumpyKernel
from remoe.plan import Deployment
from remoe.topology import Topology

if TYPE_CHECKING:
    from main_model_fn.moeless.balancing import Balancing

__all__ = ["create_app", "open_transport"]

_log = structlog.get_logger()
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(GenerateRequest)
_deployment_decoder = msgspec.json.Decoder(Deployment)


def _load(
    settings: MainSettings, topology: Topology
) -> tuple[Engine, LivePartition, Balancing | None]:
    checkpoint = Checkpoint.open(Path(topology.model_dir))
    topology.check_weights(checkpoint.digest)
    deployment = claim_deployment(
        topology.planner_url, checkpoint, main_memory_gb=topology.main_memory_gb
    )
    device = choose_device(settings)
    meter = StepMeter(
        layers=checkpoint.layers,
        experts=checkpoint.experts,
        main_memory_gb=deployment.main_memory_gb,
    )
    pool = open_pool(settings, device)
    hot = hot_budget(settings, checkpoint, deployment, device)
    model = load_served_model(
        Path(topology.model_dir),
        partition=deployment.partition,
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        device=device,
        transport=open_transport(settings, topology, checkpoint, pool),
        function_memory_gb={
            layer: topology.expert_for(layer).memory_gb for layer in checkpoint.moe_layers
        },
        meter=meter,
        pool=pool,
        hot=hot,
        payload_limit_bytes=settings.payload_limit_bytes,
        needs_library=settings.policy != "remoe",  # its gates are read from the modules
    )
    limits = EngineLimits(
        kv_tokens=settings.kv_tokens,
        page_tokens=settings.page_tokens,
        batch_tokens=settings.batch_tokens,
        max_requests=settings.max_requests,
        max_queue=settings.max_queue,
    )
    engine = Engine(
        model,
        meter,
        limits=limits,
        deployment_plan_id=deployment.plan_id,
        recurrent=checkpoint.family.recurrent,
        guides=Guides(
            Path(topology.model_dir) / "tokenizer.json", vocab_size=checkpoint.vocab_size
        ),
    )
    engine.start()
    _log.info(
        "main_function_loaded",
        plan_id=deployment.plan_id,
        origin=deployment.origin,
        local_experts=checkpoint.expert_count - deployment.partition.remote_count,
        remote_experts=deployment.partition.remote_count,
        device=device.type,
        dtype=str(model.dtype),
        kernel="torch" if pool is None else pool.description,
    )
    gpu = GpuMemory()
    if device.type == "cuda":
        gpu = GpuMemory.of(
            checkpoint,
            deployment.partition,
            kv_tokens=settings.kv_tokens,
            hot=None if pool is None else hot,
            item_bytes=model.dtype.itemsize,
        )
    partition = LivePartition(model, checkpoint, deployment, meter, gpu)
    balancing = None
    if settings.policy != "remoe":
        # Only then: it brings the tools that gate copies are trained with.
        from main_model_fn.moeless.balancing import Balancing

        balancing = Balancing(settings, topology, checkpoint, model, partition)
        balancing.start()
    return engine, partition, balancing


def open_transport(
    settings: MainSettings, topology: Topology, checkpoint: Checkpoint, pool: NativePool | None
) -> ExpertTransport:
    """How remote experts are reached, as the settings say; `pool` is for computing them here."""
    if settings.transport == "in-process":
        read, activation = checkpoint.expert, checkpoint.activation
        kernel: ExpertKernel = (
            NativeKernel(read, pool, activation=activation)
            if pool
            else NumpyKernel(read, activation=activation)
        )
        return InProcessTransport(kernel)
    return HttpTransport(
        topology,
        timeout_s=settings.call_timeout_s,
        hedge_floor_s=settings.hedge_floor_s,
        payload_limit_bytes=settings.payload_limit_bytes,
        token=settings.expert_token.get_secret_value(),
    )


def create_app(settings: MainSettings) -> FastAPI:
    """The service; its model is loaded when the lifespan starts, before it is ready."""
    topology = settings.load_topology()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine, app.state.partition, app.state.balancing = await asyncio.to_thread(
            _load, settings, topology
        )
        yield
        if app.state.balancing is not None:
            await asyncio.to_thread(app.state.balancing.stop)
        await asyncio.to_thread(app.state.engine.stop)
        plan_id = app.state.partition.deployment.plan_id
        await asyncio.to_thread(release_deployment, topology.planner_url, plan_id)

    app = FastAPI(title="Remoe main-model function", lifespan=lifespan, openapi_url=None)
    app.include_router(_router)

    @app.exception_handler(RemoeError)
    async def render_error(request: Request, error: RemoeError) -> JSONResponse:
        headers = {}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(round(error.retry_after_s))
        return JSONResponse(error.envelope(), status_code=error.status, headers=headers)

    return app


_router = APIRouter()


@_router.get("/healthz")
async def _healthz() -> Response:
    return Response("ok\n", media_type="text/plain")


@_router.get("/readyz")
async def _readyz(request: Request) -> Response:
    if request.app.state.engine.alive:
        return Response("ok\n", media_type="text/plain")
    return Response("engine stopped\n", status_code=503, media_type="text/plain")


@_router.get("/v1/deployment")
async def _deployment(request: Request) -> Response:
    partition: LivePartition = request.app.state.partition
    return Response(_encoder.encode(partition.deployment), media_type="application/json")


@_router.put("/v1/deployment")
async def _change_deployment(request: Request) -> Response:
    """Attach and detach experts until the partition is the given one; streams go on.

    With `If-Match`, a plan's id in quotes, only if that plan's partition is the running one.
    """
    partition: LivePartition = request.app.state.partition
    running = partition.deployment.plan_id
    if request.headers.get("if-match", f'"{running}"') != f'"{running}"':
        return Response(
            f"the running plan is {running}\n", status_code=412, media_type="text/plain"
        )
    try:
        wanted = _deployment_decoder.decode(await request.body())
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"not a deployment: {error}") from error
    try:
        change = await asyncio.to_thread(partition.change, wanted)
    except CheckpointError as error:
        raise InvalidRequestError(error.message) from error
    request.app.state.engine.deployment_plan_id = wanted.plan_id
    _log.info(
        "partition_changed",
        plan_id=wanted.plan_id,
        attached=change.attached,
        detached=change.detached,
    )
    return Response(_encoder.encode(change), media_type="application/json")


@_router.post("/v1/generate")
async def _generate(http_request: Request) -> StreamingResponse:
    engine: Engine = http_request.app.state.engine
    try:
        request = _decoder.decode(await http_request.body())
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"not a generate request: {error}") from error
    engine.check(request)
    lines = _lines(engine, request, http_request.app.state.balancing)
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _lines(
    engine: Engine, request: GenerateRequest, balancing: Balancing | None
) -> AsyncIterator[bytes]:
    """One JSON event a line. The status has been sent, so an error can only be an event."""
    seen = nullcontext() if balancing is None else balancing.request(request)
    try:
        with seen:
            async with aclosing(engine.generate(request)) as events:
                async for event in events:
                    if event.finish is not None and event.stats is not None:
                        trace_generation(event.stats)
                    told = event if balancing is None else balancing.reported(event)
                    yield _encoder.encode(told) + b"\n"
    except RemoeError as error:
        yield _encoder.encode(GenerateEvent(finish="error", error=error.message)) + b"\n"
    if not engine.alive:
        # A crashed engine cannot be mended from here; the runtime starts a new replica.
        os.kill(os.getpid(), signal.SIGTERM)
