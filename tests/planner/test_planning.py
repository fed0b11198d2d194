from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from planner.deployments import EPOCH, REQUEST
from planner.forecast import USUAL_DECODE_TOKENS
from planner.selection import select_remote
from remoe.errors import (
    CheckpointError,
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    SettingsError,
)
from remoe.experts import ActivationProfile, Partition
from remoe.ledger import Ledger
from remoe.plan import Plan, Slo
from remoe.prices import DEFAULT_PRICES
from remoe.topology import Topology
from tests.planner.worlds import CONTEXT, EXPERTS, LAYERS, MODEL, VOCAB, World, ask


def test_a_plan_follows_from_the_prompt_s_neighbours(world: World) -> None:
    plan = world.planner(history=world.history_file(20)).plan(ask([1, 2, 3]))
    profile = ActivationProfile(np.array(plan.profile, np.float32))
    assert plan.partition == select_remote(profile, 0.5)
    assert plan.partition.remote_count == LAYERS * EXPERTS // 2
    assert (plan.model, plan.model_digest) == (MODEL, world.model.digest)
    assert len(plan.neighbours) == 15
    similarities = [neighbour.similarity for neighbour in plan.neighbours]
    assert similarities == sorted(similarities, reverse=True)
    assert sum(n.weight for n in plan.neighbours) == pytest.approx(1, abs=1e-4)
    assert {neighbour.topic for neighbour in plan.neighbours} == {"algebra", "cooking"}
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_forecasts_name_the_functions_that_hold_the_remote_experts(world: World) -> None:
    plan = world.planner().plan(ask([1, 2, 3], max_new_tokens=5))
    # Uniform rows, half remote: a route in two is remote, for 3 + 4 tokens at top-2.
    assert {f.name: f.expected_routes for f in plan.functions} == pytest.approx(
        {"experts-00-01": 2 * 7.0, "experts-02-02": 7.0}
    )
    assert plan.prewarm == ["experts-00-01", "experts-02-02"]
    assert all(function.memory_gb >= 0.05 for function in plan.functions)


def test_a_dense_layer_has_no_experts_to_plan_for(tmp_path: Path) -> None:
    world = World.make(tmp_path, moe_layers=(1, 2))
    planner = world.planner()
    plan = planner.plan(ask([1, 2, 3]))
    assert plan.partition.remote == ((), (2, 3), (2, 3))
    routes = {function.name: function.expected_routes for function in plan.functions}
    assert routes == pytest.approx({"experts-00-01": 7.0, "experts-02-02": 7.0})
    model = world.model
    resident = model.non_expert_size_bytes + 4 * model.expert_size_bytes
    cache = (3 + 5) * model.kv_bytes_per_token
    assert plan.main_memory_gb == pytest.approx(
        (resident + cache) / 1e9 + world.settings().main_runtime_gb
    )
    counts = [[0] * EXPERTS, [3, 3, 0, 0], [3, 3, 0, 0]]
    planner.observe(world.observation([1, 2, 3], prefill_counts=counts, decode_counts=counts))
    assert planner.claim().partition.remote[0] == ()
    with pytest.raises(InvalidRequestError, match="layer 0 has no experts"):
        planner.observe(world.observation([1, 2, 3]))


def test_functions_that_will_hardly_be_called_are_not_prewarmed(world: World) -> None:
    plan = world.planner(prewarm_routes=10.0).plan(ask([1, 2, 3], max_new_tokens=5))
    assert plan.prewarm == ["experts-00-01"]


def test_an_all_local_plan_has_no_functions(world: World) -> None:
    plan = world.planner(remote_ratio=0.0).plan(ask([1]))
    assert plan.partition == Partition.all_local(LAYERS, EXPERTS)
    assert plan.functions == []
    assert plan.prewarm == []


def test_main_memory_covers_the_request_but_no_more_than_the_context(world: World) -> None:
    planner, model = world.planner(), world.model
    short, long, capped = (
        planner.plan(ask([1, 2], new)).main_memory_gb for new in (1, CONTEXT - 2, 10 * CONTEXT)
    )
    assert (long - short) * 1e9 == pytest.approx((CONTEXT - 3) * model.kv_bytes_per_token)
    assert capped == long


def test_nothing_is_forecast_before_the_first_observation(world: World) -> None:
    plan = world.planner().plan(ask([1]))
    assert (plan.predicted_ttft_s, plan.predicted_tpot_s, plan.predicted_cost_usd) == (None,) * 3


def test_a_claimed_deployment_holds_for_later_plans_until_released(world: World) -> None:
    planner = world.planner(history=world.history_file(20), neighbours=1)
    prompts = [[token] for token in range(VOCAB)]
    first = planner.plan(ask(prompts[0]))
    other = next(
        prompt for prompt in prompts if planner.plan(ask(prompt)).partition != first.partition
    )
    first = planner.plan(ask(prompts[0]))
    deployment = planner.claim()
    assert (deployment.plan_id, deployment.origin) == (first.plan_id, REQUEST)
    assert deployment.partition == first.partition
    current = planner.deployment
    assert current == deployment

    later = planner.plan(ask(other))
    assert later.partition == first.partition
    assert later.main_memory_gb == deployment.main_memory_gb
    assert later.profile != first.profile

    planner.release()
    planner.release()
    current = planner.deployment
    assert current is None
    assert planner.plan(ask(other)).partition != first.partition


def test_a_claim_long_after_the_last_request_gets_the_epoch_plan(world: World) -> None:
    planner = world.planner(history=world.history_file(20), claim_window_s=30.0)
    planner.plan(ask([1]))
    world.clock.now += 31
    deployment = planner.claim()
    assert deployment.origin == EPOCH
    assert deployment.plan_id.startswith("epoch-")
    history = planner.history
    demand = history.mean_profiles().mixed(history.mean_prompt_tokens, USUAL_DECODE_TOKENS)
    assert deployment.partition == select_remote(demand, 0.5)


def test_the_epoch_plan_follows_what_is_written_as_answers_grow(world: World) -> None:
    def epoch_after(decode_steps: int) -> Partition:
        planner = world.planner(remote_ratio=0.5)
        # Reads with experts 0 and 1, writes with 2 and 3.
        steps = [[0, 0, decode_steps, decode_steps]] * LAYERS
        planner.observe(world.observation([1, 2, 3], decode_counts=steps))
        return planner.claim().partition

    assert epoch_after(2).remote == ((2, 3),) * LAYERS
    assert epoch_after(4).remote == ((0, 1),) * LAYERS


def test_observations_turn_into_history_and_forecasts(world: World) -> None:
    planner = world.planner()
    planner.plan(ask([1, 2, 3, 4]))
    deployed = planner.claim()
    ledger = Ledger(main_cpu_gb_s=0.8, remote_gb_s=0.001, remote_calls=10)
    noted = planner.observe(
        world.observation([1, 2, 3, 4], ttft_s=3.4, cold_start_s=3.0, ledger=ledger)
    )
    assert (noted.history_id, noted.known_prompt) == (0, False)

    plan = planner.plan(ask([1, 2, 3, 4], max_new_tokens=5))
    assert plan.profile == [[0.5, 0.5, 0, 0]] * LAYERS
    assert plan.predicted_ttft_s == pytest.approx(0.4)
    assert plan.predicted_tpot_s == pytest.approx(0.1)
    # The deployment keeps experts 0 and 1 here, so no remote call is expected: what remains is
    # the main function's bill of the very same request.
    assert deployed.partition.remote == ((2, 3),) * LAYERS
    assert plan.predicted_cost_usd == pytest.approx(0.8 * DEFAULT_PRICES.cpu_usd_per_gb_s)

    assert planner.observe(world.observation([1, 2, 3, 4])).known_prompt
    stats = planner.stats()
    assert (stats.entries, stats.known_prompts_seen_again) == (1, 1)
    assert stats.measured.decode_tokens == 4


def test_predictions_are_compared_with_what_happened_once(world: World) -> None:
    planner = world.planner()
    plan = planner.plan(ask([1, 2]))
    noted = planner.observe(world.observation([1, 2], plan_id=plan.plan_id))
    # Uniform over 4 was predicted, two experts of 4 were used, in both phases.
    expected = 0.5 * np.log(0.5 / 0.375) + 0.25 * np.log(0.25 / 0.375) + 0.25 * np.log(2)
    assert noted.prefill_js_nats == pytest.approx(expected, abs=1e-6)
    assert noted.decode_js_nats == pytest.approx(expected, abs=1e-6)
    stats = planner.stats()
    assert stats.prefill_js_nats == stats.decode_js_nats == noted.prefill_js_nats
    again = planner.observe(world.observation([1, 2], plan_id=plan.plan_id))
    assert (again.prefill_js_nats, again.decode_js_nats) == (None, None)
    assert (planner.stats().prefill_compared, planner.stats().decode_compared) == (1, 1)


def test_a_phase_that_did_not_happen_is_not_compared(world: World) -> None:
    planner = world.planner()
    plan = planner.plan(ask([1, 2], max_new_tokens=1))
    zero = [[0] * EXPERTS] * LAYERS
    noted = planner.observe(
        world.observation([1, 2], plan_id=plan.plan_id, decode_counts=zero, tpot_s=None)
    )
    assert noted.prefill_js_nats is not None
    assert noted.decode_js_nats is None
    stats = planner.stats()
    assert (stats.prefill_compared, stats.decode_compared, stats.decode_js_nats) == (1, 0, None)


def test_a_plan_weighs_reading_against_writing(world: World) -> None:
    planner = world.planner()
    written = [[0, 0, 4, 4]] * LAYERS
    planner.observe(world.observation([1, 2, 3], decode_counts=written))
    short = planner.plan(ask([1, 2, 3], max_new_tokens=2))
    long = planner.plan(ask([1, 2, 3], max_new_tokens=10))
    # Three tokens read with experts 0 and 1; one written, or the four that were observed.
    assert short.profile[0] == pytest.approx([3 / 8, 3 / 8, 1 / 8, 1 / 8], abs=1e-6)
    assert long.profile[0] == pytest.approx([3 / 14, 3 / 14, 4 / 14, 4 / 14], abs=1e-6)
    assert short.partition.remote == ((2, 3),) * LAYERS
    assert long.partition.remote == ((0, 1),) * LAYERS


def test_an_infeasible_slo_is_said_so_once_times_are_known(world: World) -> None:
    planner = world.planner()
    tight = msgspec.structs.replace(ask([1]), slo=Slo(ttft_s=1e-6, tpot_s=1.0))
    assert planner.plan(tight).feasible
    planner.observe(world.observation([1]))
    assert not planner.plan(tight).feasible


def test_a_request_without_activations_teaches_times_only(world: World) -> None:
    planner = world.planner()
    zero = [[0] * EXPERTS] * LAYERS
    noted = planner.observe(world.observation([1], prefill_counts=zero, decode_counts=zero))
    assert noted.history_id is None
    assert planner.stats().entries == 0
    assert planner.stats().measured.requests == 1


def test_bad_plan_requests_say_what_is_wrong(world: World) -> None:
    planner = world.planner()
    with pytest.raises(ModelNotFoundError, match=f"'gpt'.*{MODEL}"):
        planner.plan(msgspec.structs.replace(ask([1]), model="gpt"))
    with pytest.raises(InvalidRequestError, match="empty"):
        planner.plan(ask([]))
    with pytest.raises(InvalidRequestError, match=rf"prompt_tokens\[1\] is {VOCAB}, outside"):
        planner.plan(ask([1, VOCAB]))
    with pytest.raises(InvalidRequestError, match=r"prompt_tokens\[0\] is -1"):
        planner.plan(ask([-1, 1]))
    with pytest.raises(ContextLengthError, match=f"{CONTEXT + 1} tokens"):
        planner.plan(ask([1] * (CONTEXT + 1)))
    with pytest.raises(InvalidRequestError, match="max_new_tokens is 0"):
        planner.plan(ask([1], max_new_tokens=0))
    with pytest.raises(InvalidRequestError, match="slo"):
        planner.plan(msgspec.structs.replace(ask([1]), slo=Slo(ttft_s=0.0, tpot_s=1.0)))
    assert planner.claim().origin == EPOCH, "a refused request must not decide a deployment"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_digest": "sha256:other"},
        {"prompt_tokens": []},
        {"prompt_tokens": [VOCAB]},
        {"prefill_counts": [[1] * EXPERTS] * (LAYERS - 1)},
        {"prefill_counts": [[1] * EXPERTS] * (LAYERS - 1) + [[1]]},
        {"decode_counts": [[-1] * EXPERTS] * LAYERS},
        {"decode_counts": [[2**63] * EXPERTS] * LAYERS},
        {"ttft_s": -1.0},
        {"ttft_s": float("inf")},
        {"tpot_s": float("nan")},
        {"cold_start_s": -0.1},
    ],
)
def test_bad_observations_are_refused_and_change_nothing(
    world: World, changes: dict[str, object]
) -> None:
    planner = world.planner()
    before = planner.stats()
    with pytest.raises(InvalidRequestError):
        planner.observe(world.observation([1, 2], **changes))
    assert planner.stats() == before


def test_a_history_as_large_as_the_capacity_still_learns(world: World) -> None:
    planner = world.planner(history=world.history_file(20), history_capacity=20)
    planner.observe(world.observation([1, 2, 3]))
    stats = planner.stats()
    assert (stats.entries, stats.folded) == (20, 1)


def test_every_layer_needs_a_function_unless_all_is_local(world: World) -> None:
    topology = Topology.load(world.topology_path)
    msgspec.structs.replace(topology, experts=topology.experts[:1]).save(world.topology_path)
    with pytest.raises(SettingsError, match="layer 2"):
        world.planner()
    world.planner(remote_ratio=0.0)


def test_a_missing_model_is_a_checkpoint_error(world: World) -> None:
    topology = Topology.load(world.topology_path)
    msgspec.structs.replace(topology, model_dir=str(world.folder / "no")).save(world.topology_path)
    with pytest.raises(CheckpointError):
        world.planner()


def test_the_time_module_is_a_clock(world: World) -> None:
    world.clock = time  # type: ignore[assignment]
    assert world.planner().plan(ask([1])).plan_id.startswith("plan-")
