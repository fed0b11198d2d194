"""Planning with a hardware profile: previews, diffs, explanations, epoch reviews, OpenAPI."""

from __future__ import annotations

from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from planner.app import create_app
from planner.planning import Planner
from remoe.errors import InvalidRequestError, NotFoundError, SettingsError
from remoe.experts import Partition
from remoe.plan import Plan, Slo
from remoe.planning_messages import Explanation, PlanDiffRequest, PreviewRequest, PriceOverride
from tests.planner.worlds import EXPERTS, LAYERS, MODEL, World, ask
from tests.remoe.hardware_profiles import some_profile


def optimising(world: World, **changes: object) -> Planner:
    profile = some_profile(model_digest=world.model.digest)
    path = profile.save(world.folder)
    return world.planner(**{"history": world.history_file(20), "hardware": path, **changes})


def preview(tokens: list[int], **changes: object) -> PreviewRequest:
    asked = PreviewRequest(model=MODEL, prompt_tokens=tokens, max_new_tokens=20)
    return msgspec.structs.replace(asked, **changes)


def test_with_a_profile_everything_is_predicted_before_the_first_request(world: World) -> None:
    plan = optimising(world).plan(ask([1, 2, 3]))
    assert plan.status == "feasible"
    assert plan.predicted_ttft_s is not None
    assert plan.predicted_tpot_s is not None
    assert plan.cost_split is not None
    assert plan.predicted_cost_usd == pytest.approx(
        plan.cost_split.main_usd
        + plan.cost_split.remote_prefill_usd
        + plan.cost_split.remote_decode_usd
    )
    assert plan.slo_ttft_s is not None
    # The main function sleeps: 2.5 times its mean cold start is what an SLO must allow for.
    assert plan.slo_ttft_s > 10 > plan.predicted_ttft_s
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_an_slo_that_no_plan_holds_says_what_would_do(world: World) -> None:
    planner = optimising(world)
    planner.plan(ask([1]))
    planner.claim()
    late = planner.preview(preview([1, 2], slo=Slo(ttft_s=1e-4, tpot_s=1e-5), rule="cost"))
    assert (late.status, late.feasible) == ("infeasible", False)
    assert late.needed is not None
    enough = Slo(ttft_s=10.0, tpot_s=late.needed.tpot_s * 1.001)
    again = planner.preview(preview([1, 2], slo=enough, rule="per-layer"))
    assert again.status == "feasible"
    why = planner.explain(late.plan_id).why
    assert any("No plan holds the SLO" in sentence for sentence in why)


def test_previews_change_nothing(world: World) -> None:
    planner = optimising(world)
    planner.preview(preview([1, 2, 3], ratio=0.25))
    assert planner.claim().origin == "epoch"


def test_what_if(world: World) -> None:
    planner = optimising(world)
    usual = planner.preview(preview([1, 2, 3]))
    assert usual.predicted_cost_usd is not None

    none = planner.preview(preview([1, 2, 3], ratio=0.0))
    half = planner.preview(preview([1, 2, 3], ratio=0.5))
    assert none.partition.remote_count == 0
    assert half.partition.remote_count == LAYERS * EXPERTS // 2
    assert usual.predicted_cost_usd <= min(
        none.predicted_cost_usd or 0, half.predicted_cost_usd or 0
    ) * (1 + 1e-9)

    dear = planner.preview(
        preview([1, 2, 3], ratio=0.5, prices=PriceOverride(cpu_usd_per_gb_s=2.3e-4))
    )
    assert dear.predicted_cost_usd == pytest.approx(10 * (half.predicted_cost_usd or 0))

    long = planner.preview(preview([1, 2, 3], ratio=0.5, prompt_length=60, decode_tokens=100.0))
    assert (long.predicted_ttft_s or 0) > 2 * (half.predicted_ttft_s or 1)

    own = Partition(experts=EXPERTS, remote=((0,), (), (1, 3)))
    given = planner.preview(preview([1, 2, 3], partition=own))
    assert given.partition == own
    assert given.status == "feasible"

    for platform in ("proportional", "lambda", "cloud-run", "fargate"):
        sold = planner.preview(
            preview([1, 2, 3], platform=platform, granularity="layer", ratio=0.5)
        )
        assert sold.functions[0].vcpus is not None


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"ratio": 1.5}, "ratio"),
        ({"prompt_length": 0}, "prompt_length"),
        ({"decode_tokens": float("nan")}, "decode_tokens"),
        ({"prices": PriceOverride(cpu_usd_per_gb_s=-1.0)}, "prices.cpu_usd_per_gb_s"),
        ({"partition": Partition.all_local(1, 2)}, "partition"),
        ({"partition": Partition.all_local(LAYERS, EXPERTS), "ratio": 0.5}, "partition"),
        ({"prompt_tokens": []}, "prompt_tokens"),
    ],
)
def test_bad_previews_say_what_is_wrong(
    world: World, changes: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        optimising(world).preview(preview([1, 2], **changes))
    assert caught.value.param == param


def test_without_a_profile_a_preview_says_what_it_cannot_do(world: World) -> None:
    planner = world.planner()
    assert planner.preview(preview([1, 2], ratio=0.25)).partition.remote_count == LAYERS
    with pytest.raises(InvalidRequestError, match="remoe profile hardware"):
        planner.preview(preview([1, 2], platform="lambda"))


def test_explanations_add_up(world: World) -> None:
    planner = optimising(world, ratio_rule="fixed")
    plan = planner.plan(ask([1, 2, 3]))
    told = planner.explain(plan.plan_id)
    assert told.plan == plan
    assert [layer.layer for layer in told.layers] == list(range(LAYERS))
    assert {one.name for one in told.baselines} == {"MIX", "CPU", "GPU", "Fetch"}
    for layer in told.layers:
        assert sum(layer.decode_shares) == pytest.approx(1, abs=1e-4)
        assert [remote.expert for remote in layer.remote] == list(
            plan.partition.remote[layer.layer]
        )
        assert layer.least_used_local_routes is not None
        for remote in layer.remote:
            assert remote.expected_routes <= layer.least_used_local_routes + 1e-3
            assert remote.rank > EXPERTS // 2
    assert any("similar prompts" in sentence for sentence in told.why)
    assert msgspec.json.decode(msgspec.json.encode(told), type=Explanation) == told
    with pytest.raises(NotFoundError, match="plan-none"):
        planner.explain("plan-none")


def test_a_diff_names_every_expert_that_moves(world: World) -> None:
    planner = optimising(world)
    none = planner.preview(preview([1, 2, 3], ratio=0.0))
    half = planner.preview(preview([1, 2, 3], ratio=0.5))
    change = planner.diff(PlanDiffRequest(before=none.plan_id, after=half.plan_id))
    assert change.becomes_local == []
    assert change.becomes_remote == [
        (expert.layer, expert.index) for expert in half.partition.remote_ids()
    ]
    assert change.main_memory_gb.change == pytest.approx(half.main_memory_gb - none.main_memory_gb)
    assert set(change.functions) == {function.name for function in half.functions}
    back = planner.diff(PlanDiffRequest(before=half.plan_id, after=none.plan_id))
    assert back.becomes_local == change.becomes_remote


def test_times_are_calibrated_by_what_happened_and_drift_asks_for_new_plans(world: World) -> None:
    planner = optimising(world)
    planner.claim()
    first = planner.plan(ask([1, 2, 3]))
    for _ in range(8):
        plan = planner.plan(ask([1, 2, 3]))
        planner.observe(
            world.observation(
                [1, 2, 3],
                plan_id=plan.plan_id,
                ttft_s=3 * (first.predicted_ttft_s or 0),
                tpot_s=2 * (first.predicted_tpot_s or 0),
            )
        )
    drift = planner.stats().drift
    assert (drift.prefill_factor, drift.decode_factor) == pytest.approx((3, 2), rel=0.02)
    assert drift.replan
    later = planner.plan(ask([1, 2, 3]))
    assert later.predicted_tpot_s == pytest.approx(2 * (first.predicted_tpot_s or 0), rel=0.3)
    planner.release()
    planner.claim()
    world.clock.now += 100
    planner.release()
    planner.claim()
    assert not planner.stats().drift.replan


def test_an_epoch_changes_only_when_that_pays(world: World) -> None:
    planner = optimising(world, ratio_rule="fixed")
    assert "not running" in planner.review().why
    planner.claim()
    assert "No request" in planner.review().why

    def serve(experts: list[int], requests: int) -> None:
        counts = [[8 * (expert in experts) for expert in range(EXPERTS)]] * LAYERS
        for _ in range(requests):
            planner.observe(
                world.observation([5, 6, 7], prefill_counts=counts, decode_counts=counts)
            )

    deployed = planner.deployment
    assert deployed is not None
    remote = list(deployed.partition.remote[0])
    serve(remote, 1)
    review = planner.review()
    if review.expected_requests:
        assert review.cost_of_change_usd is not None
    serve(remote, 40)
    review = planner.review()
    assert review.change, review.why
    assert review.candidate is not None
    assert not set(review.candidate.partition.remote[0]) & set(remote)
    # Where reading experts is dear, the same saving does not pay.
    epochs = planner._epochs
    epochs._hardware = msgspec.structs.replace(epochs._hardware, read_bytes_per_s=1.0)  # type: ignore[type-var]
    assert not planner.review().change
    # And what fell out of the window counts no more.
    world.clock.now += planner._settings.epoch_window_s + 1
    assert "No request" in planner.review().why


def test_a_profile_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    path = some_profile(model_digest="sha256:other").save(tmp_path)
    with pytest.raises(SettingsError, match="another model"):
        world.planner(hardware=path)


@pytest.mark.anyio
async def test_the_routes_and_their_description(world: World) -> None:
    transport = httpx.ASGITransport(create_app(optimising(world)))
    async with httpx.AsyncClient(transport=transport, base_url="http://planner") as client:
        document = (await client.get("/openapi.json")).json()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if not path.startswith("/v1/") or path.endswith(":release"):
                    continue
                replies = operation["responses"].values()
                assert all("content" in reply or reply for reply in replies)
        examples = document["paths"]["/v1/plan:preview"]["post"]["requestBody"]["content"][
            "application/json"
        ]["examples"]
        for example in examples.values():
            msgspec.convert(example["value"], PreviewRequest)
        assert "Explanation" in document["components"]["schemas"]

        first = await client.post(
            "/v1/plan:preview", content=msgspec.json.encode(preview([1, 2], ratio=0.0))
        )
        second = await client.post("/v1/plan", content=msgspec.json.encode(ask([1, 2])))
        ids = [reply.json()["plan_id"] for reply in (first, second)]
        told = await client.post("/v1/plan:diff", json={"before": ids[0], "after": ids[1]})
        assert told.status_code == 200
        explained = await client.get(f"/v1/explain/{ids[1]}")
        assert explained.json()["plan"]["plan_id"] == ids[1]
        assert (await client.get("/v1/explain/none")).status_code == 404
        review = (await client.get("/v1/deployment:review")).json()
        assert review["change"] is False


def test_a_plan_of_thirty_layers_is_quick_enough_to_make(world: World) -> None:
    """A guard against a mistake, not a measurement: bench/planning.py has those."""
    import time

    planner = optimising(world)
    took = []
    for _ in range(10):
        before = time.perf_counter()
        planner.plan(ask([1, 2, 3]))
        took.append(time.perf_counter() - before)
    assert np.median(took) < 0.5


def test_with_a_gpu_only_what_is_on_it_has_its_price(world: World) -> None:
    """Local experts are the CPU's (A.2): making GPUs dearer leaves their price as it was."""
    profile = some_profile(model_digest=world.model.digest, main_on_gpu=True)
    planner = world.planner(history=world.history_file(20), hardware=profile.save(world.folder))

    def cost(ratio: float, gpu_usd: float) -> float:
        prices = PriceOverride(cpu_usd_per_gb_s=1e-5, gpu_usd_per_gb_s=gpu_usd)
        plan = planner.preview(preview([1, 2, 3], ratio=ratio, prices=prices, decode_tokens=0.0))
        assert plan.predicted_cost_usd is not None
        assert plan.predicted_ttft_s is not None
        return plan.predicted_cost_usd / plan.predicted_ttft_s

    model = world.model
    on_gpu_gb = (model.non_expert_size_bytes + 3 * model.kv_bytes_per_token) / 1e9
    for ratio in (0.0, 0.5):
        assert cost(ratio, 3e-3) - cost(ratio, 1e-3) == pytest.approx(2e-3 * on_gpu_gb, rel=1e-6)
