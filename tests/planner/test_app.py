from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import httpx
import msgspec
import numpy as np
import pytest

from planner.app import create_app
from planner.planning import Planner
from planner.regression import RegressionPredictor
from planner.routing_fit import RoutingFit
from planner.wire import MAX_BODY_BYTES
from remoe.activation_totals import ActivationTotals
from remoe.plan import Deployment, Plan, PlanRequest
from tests.planner.worlds import MODEL, VOCAB, World, ask

pytestmark = pytest.mark.anyio


def client_of(planner: Planner) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(planner), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://planner")


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(world.planner(history=world.history_file(20))) as opened:
        yield opened


async def post_plan(client: httpx.AsyncClient, request: PlanRequest) -> httpx.Response:
    return await client.post("/v1/plan", content=msgspec.json.encode(request))


def error_of(response: httpx.Response) -> dict[str, str | None]:
    assert response.headers["content-type"] == "application/json"
    error: dict[str, str | None] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_life_of_a_deployment(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/deployment")
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"

    response = await post_plan(client, ask([1, 2, 3]))
    assert response.status_code == 200
    plan = msgspec.json.decode(response.content, type=Plan)

    response = await client.post("/v1/deployment:claim")
    deployment = msgspec.json.decode(response.content, type=Deployment)
    assert (deployment.plan_id, deployment.partition) == (plan.plan_id, plan.partition)
    assert (await client.get("/v1/deployment")).content == response.content

    other = await client.post("/v1/deployment:release", params={"plan_id": "plan-other"})
    assert other.status_code == 204
    assert (await client.get("/v1/deployment")).status_code == 200
    for _ in range(2):
        assert (await client.post("/v1/deployment:release", content=b"{}")).status_code == 204
    assert (await client.get("/v1/deployment")).status_code == 404


async def test_observations_show_in_the_history(client: httpx.AsyncClient, world: World) -> None:
    body = msgspec.json.encode(world.observation([5, 6, 7]))
    response = await client.post("/v1/observations", content=body)
    assert response.status_code == 202
    assert response.json() == {
        "history_id": 20,
        "known_prompt": False,
        "prefill_js_nats": None,
        "decode_js_nats": None,
    }
    stats = (await client.get("/v1/history")).json()
    assert (stats["entries"], stats["shipped"]) == (21, 20)
    assert stats["topics"] == 2
    assert stats["sets"] == {"algebra": 10, "cooking": 10, "observed": 1}
    assert stats["measured"]["decode_s_per_token"] == pytest.approx(0.1)


def fit_of(planner: Planner) -> RoutingFit | None:
    assert isinstance(planner._predictor, RegressionPredictor)
    return planner._predictor._fit


async def test_observations_lead_to_a_fit_in_the_background(world: World) -> None:
    planner = world.planner()
    async with client_of(planner) as client:
        for token in range(31):
            body = msgspec.json.encode(world.observation([token, token, 31]))
            await client.post("/v1/observations", content=body)
        assert planner.to_fit is None
        assert fit_of(planner) is None
        body = msgspec.json.encode(world.observation([1, 2, 3]))
        await client.post("/v1/observations", content=body)
        fit = fit_of(planner)
        assert fit is not None
        assert fit.entries == 32
        plan = msgspec.json.decode((await post_plan(client, ask([1, 2]))).content, type=Plan)
        np.testing.assert_allclose(plan.profile, [[0.5, 0.5, 0, 0]] * 3, atol=1e-3)


async def test_routes_are_counted_as_predicted_and_as_they_came(
    client: httpx.AsyncClient, world: World
) -> None:
    before = msgspec.json.decode(
        (await client.get("/v1/activations")).content, type=ActivationTotals
    )
    assert before.requests == 0
    plan = msgspec.json.decode((await post_plan(client, ask([5, 6, 7]))).content, type=Plan)
    observation = world.observation([5, 6, 7], plan_id=plan.plan_id)
    for body in (observation, world.observation([8, 9])):  # the other one has no plan
        await client.post("/v1/observations", content=msgspec.json.encode(body))
    read = msgspec.json.decode((await client.get("/v1/activations")).content, type=ActivationTotals)
    since = read.since(before)
    actual = np.add(observation.prefill_counts, observation.decode_counts)
    assert since.requests == 1
    assert since.actual == actual.tolist()
    # Predicted shares of the routes that came: the same number in every layer.
    assert np.sum(since.predicted, axis=1) == pytest.approx(actual.sum(axis=1), abs=0.01)


async def test_readiness_says_when_predictions_are_uniform(
    client: httpx.AsyncClient, world: World
) -> None:
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()["history_entries"]) == (200, 20)
    async with client_of(world.planner()) as empty:
        assert "uniform" in (await empty.get("/readyz")).json()["predictions"]
    assert (await client.get("/healthz")).status_code == 200


async def test_unknown_models_are_not_found(client: httpx.AsyncClient) -> None:
    response = await post_plan(client, msgspec.structs.replace(ask([1]), model="gpt"))
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL in str(error["message"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b'{"a": "\xff"}', None),
        (b"[]", None),
        (b"{}", None),
        (b'{"model": 3, "prompt_tokens": [1], "max_new_tokens": 1}', "model"),
        (b'{"model": "m", "prompt_tokens": [1, "x"], "max_new_tokens": 1}', "prompt_tokens[1]"),
        (b'{"model": "m", "prompt_tokens": [1], "max_new_tokens": 1.5}', "max_new_tokens"),
        (
            b'{"model": "tiny-moe", "prompt_tokens": [%d], "max_new_tokens": 1}' % VOCAB,
            "prompt_tokens",
        ),
        (b'{"model": "tiny-moe", "prompt_tokens": [], "max_new_tokens": 1}', "prompt_tokens"),
        (b'{"model": "tiny-moe", "prompt_tokens": [%d], "max_new_tokens": 1}' % 10**30, None),
    ],
)
async def test_bad_bodies_get_the_envelope(
    client: httpx.AsyncClient, body: bytes, param: str | None
) -> None:
    response = await client.post("/v1/plan", content=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


async def test_a_body_too_large_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/plan", content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/plan", 405)]
)
async def test_wrong_routes_get_the_envelope(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert path in str(error_of(response)["message"])


async def test_a_bug_gets_the_envelope_and_not_its_details(world: World) -> None:
    planner = world.planner()
    planner._lessons.learner = None  # type: ignore[assignment]
    async with client_of(planner) as client:
        response = await post_plan(client, ask([1]))
    assert response.status_code == 500
    error = error_of(response)
    assert error["code"] == "internal_error"
    assert "NoneType" not in str(error["message"])


async def test_concurrent_plans_and_observations_all_count(
    client: httpx.AsyncClient, world: World
) -> None:
    plan_ids: list[str] = []

    async def plan(token: int) -> None:
        plan_ids.append((await post_plan(client, ask([token]))).json()["plan_id"])

    async def observe(token: int) -> None:
        body = msgspec.json.encode(world.observation([token, token + 1]))
        await client.post("/v1/observations", content=body)

    async with anyio.create_task_group() as group:
        for token in range(20):
            group.start_soon(plan, token)
            group.start_soon(observe, token)
    assert len(set(plan_ids)) == 20
    stats = (await client.get("/v1/history")).json()
    assert stats["entries"] == 40
    assert stats["measured"]["requests"] == 20
