"""Wire the planner service: routes around one `Planner` that runs in one worker thread.

See papers.md A.6.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar, cast

import anyio
from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import Response
from starlette.background import BackgroundTask

from planner.adaptation import Adapter, put_deployment
from planner.epoch import EpochReview
from planner.lessons import HistoryStats, Noted
from planner.openapi import describe, described
from planner.planning import Planner
from planner.routing_fit import RoutingFit
from planner.wire import add_error_handlers, json_response, read_message
from remoe import __version__
from remoe.errors import NotFoundError
from remoe.plan import Deployment, Observation, Plan, PlanRequest
from remoe.planning_messages import Explanation, PlanDiff, PlanDiffRequest, PreviewRequest

__all__ = ["create_app"]

_Result = TypeVar("_Result")
_router = APIRouter()


class _Worker:
    """Runs the planner, one call at a time: it is not thread-safe, and the loop never waits."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._limiter = CapacityLimiter(1)
        self._fitting = False

    async def run(self, work: Callable[[], _Result]) -> _Result:
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    async def fit(self) -> None:
        """Renew the predictor's fit if that is due; plans go on meanwhile, from the last one."""
        if self._fitting:
            return
        self._fitting = True
        try:
            predictor = await self.run(lambda: self.planner.to_fit)
            if predictor is not None:
                sample = await self.run(predictor.sample)
                fit = await anyio.to_thread.run_sync(lambda: RoutingFit.of(*sample))
                await self.run(lambda: predictor.install(fit))
        finally:
            self._fitting = False

    def adapter(self, main_url: str) -> Adapter:
        return Adapter(
            review=lambda: self.run(self.planner.review),
            running=lambda: self.planner.deployment,
            put=lambda deployment, instead_of: put_deployment(main_url, deployment, instead_of),
            adapted=lambda deployment, instead_of: self.run(
                lambda: self.planner.adapted(deployment, instead_of)
            ),
        )


def create_app(
    planner: Planner, *, main_url: str | None = None, adapt_every_s: float = 0.0
) -> FastAPI:
    """The service. It is ready as soon as it runs: the planner has been loaded before.

    Every `adapt_every_s`, unless 0, the main function's partition is changed if that pays.
    """
    worker = _Worker(planner)

    @asynccontextmanager
    async def adapting(_: FastAPI) -> AsyncIterator[None]:
        task = None
        if main_url is not None and adapt_every_s > 0:
            task = asyncio.create_task(worker.adapter(main_url).forever(adapt_every_s))
        yield
        if task is not None:
            task.cancel()

    app = FastAPI(
        title="Remoe planner",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=adapting,
    )
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.state.worker = worker
    add_error_handlers(app)
    app.include_router(_router)
    return app


async def _worker(request: Request) -> _Worker:
    return cast("_Worker", request.app.state.worker)


_TheWorker = Annotated[_Worker, Depends(_worker)]


@_router.post("/v1/plan", **described(Plan, PlanRequest))
async def _plan(request: Request, worker: _TheWorker) -> Response:
    """Plan a request: which experts are remote, and what it should take and cost."""
    asked = await read_message(request, PlanRequest)
    return json_response(await worker.run(lambda: worker.planner.plan(asked)))


@_router.post("/v1/plan:preview", **described(Plan, PreviewRequest))
async def _preview(request: Request, worker: _TheWorker) -> Response:
    """Plan under other assumptions; nothing comes of it."""
    asked = await read_message(request, PreviewRequest)
    return json_response(await worker.run(lambda: worker.planner.preview(asked)))


@_router.post("/v1/plan:diff", **described(PlanDiff, PlanDiffRequest))
async def _diff(request: Request, worker: _TheWorker) -> Response:
    """Say what changes from one recent plan or preview to another."""
    asked = await read_message(request, PlanDiffRequest)
    return json_response(await worker.run(lambda: worker.planner.diff(asked)))


@_router.get("/v1/explain/{plan_id}", **described(Explanation))
async def _explain(plan_id: str, worker: _TheWorker) -> Response:
    """Say why a recent plan is as it is."""
    return json_response(await worker.run(lambda: worker.planner.explain(plan_id)))


@_router.get("/v1/deployment:review", **described(EpochReview))
async def _review(worker: _TheWorker) -> Response:
    """Say whether the running partition should change, and to what."""
    return json_response(await worker.run(worker.planner.review))


@_router.post("/v1/deployment:claim", **described(Deployment))
async def _claim(worker: _TheWorker) -> Response:
    """Give a starting main function what it is to load."""
    return json_response(await worker.run(worker.planner.claim))


@_router.post("/v1/deployment:release")
async def _release(worker: _TheWorker, plan_id: Annotated[str | None, Query()] = None) -> Response:
    await worker.run(lambda: worker.planner.release(plan_id))
    return Response(status_code=204)


@_router.get("/v1/deployment", **described(Deployment))
async def _deployment(worker: _TheWorker) -> Response:
    """What the main function runs."""
    deployment = worker.planner.deployment
    if deployment is None:
        raise NotFoundError(
            "No deployment is claimed: the main function is not running. Send a request to wake it."
        )
    return json_response(deployment)


@_router.post("/v1/observations", **described(Noted, Observation, status=202))
async def _observations(request: Request, worker: _TheWorker) -> Response:
    """Learn from a finished request."""
    observed = await read_message(request, Observation)
    response = json_response(await worker.run(lambda: worker.planner.observe(observed)), 202)
    response.background = BackgroundTask(worker.fit)
    return response


@_router.get("/v1/history", **described(HistoryStats))
async def _history(worker: _TheWorker) -> Response:
    """What is remembered, how good predictions were, and what times are expected."""
    return json_response(await worker.run(worker.planner.stats))


@_router.get("/v1/activations")
async def _activations(worker: _TheWorker) -> Response:
    return json_response(await worker.run(worker.planner.activations))


@_router.get("/healthz")
async def _healthz() -> Response:
    return json_response({"status": "ok"})


@_router.get("/readyz")
async def _readyz(worker: _TheWorker) -> Response:
    entries = len(worker.planner.history)
    predictions = "from similar prompts" if entries else "uniform: the history is empty"
    return json_response(
        {
            "status": "ready",
            "history_entries": entries,
            "predictions": predictions,
            "history_problem": worker.planner.history.store.problem,
        }
    )
