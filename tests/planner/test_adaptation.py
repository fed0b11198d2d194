"""A running partition changes when that pays, when the main function takes it, and not otherwise."""

from __future__ import annotations

import asyncio
import urllib.error
from email.message import Message

import pytest

from planner.adaptation import Adapter
from planner.planning import Planner
from remoe.plan import Deployment
from tests.planner.test_what_if import optimising
from tests.planner.worlds import EXPERTS, LAYERS, World


def adapter_of(
    planner: Planner, taken: list[tuple[Deployment, str]], error: OSError | None = None
) -> Adapter:
    async def review():  # type: ignore[no-untyped-def]  # noqa: ANN202
        return planner.review()

    async def adapted(deployment: Deployment, instead_of: str) -> None:
        planner.adapted(deployment, instead_of)

    def put(deployment: Deployment, instead_of: str) -> None:
        if error is not None:
            raise error
        taken.append((deployment, instead_of))

    return Adapter(review=review, running=lambda: planner.deployment, put=put, adapted=adapted)


def serve(world: World, planner: Planner, experts: tuple[int, ...], requests: int) -> None:
    counts = [[8 * (expert in experts) for expert in range(EXPERTS)]] * LAYERS
    for _ in range(requests):
        planner.observe(world.observation([5, 6, 7], prefill_counts=counts, decode_counts=counts))


def test_a_partition_follows_the_demand(world: World) -> None:
    planner = optimising(world, ratio_rule="fixed")
    taken: list[tuple[Deployment, str]] = []
    adapter = adapter_of(planner, taken)
    assert not asyncio.run(adapter.once())  # nothing runs, nothing wakes
    before = planner.claim()
    assert not asyncio.run(adapter.once())
    remote = before.partition.remote[0]
    serve(world, planner, remote, 40)
    assert asyncio.run(adapter.once())
    (wanted, instead_of), after = taken[0], planner.deployment
    assert after == wanted
    assert instead_of == before.plan_id
    assert not set(wanted.partition.remote[0]) & set(remote)
    assert not asyncio.run(adapter.once())  # and stays, the demand being the same


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError("nobody listens"),
        urllib.error.HTTPError("", 412, "the running plan is another", Message(), None),
    ],
)
def test_what_the_main_function_did_not_take_did_not_happen(world: World, error: OSError) -> None:
    planner = optimising(world, ratio_rule="fixed")
    before = planner.claim()
    serve(world, planner, before.partition.remote[0], 40)
    assert not asyncio.run(adapter_of(planner, [], error).once())
    assert planner.deployment == before


def test_a_successor_is_not_taken_for_its_predecessor(world: World) -> None:
    planner = optimising(world)
    first = planner.claim()
    planner.release()
    second = planner.claim()
    planner.adapted(first, first.plan_id)
    assert planner.deployment == second


def test_no_more_memory_than_the_main_function_may_hold(world: World) -> None:
    planner = optimising(world, ratio_rule="fixed")
    before = planner.claim()
    serve(world, planner, before.partition.remote[0], 40)
    planner._epochs._most_main_gb = before.main_memory_gb / 2
    review = planner.review()
    assert not review.change
    assert "may hold" in review.why
