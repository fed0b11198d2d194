"""Policies compared by the planner: figures that add up, and the cheapest within the SLO."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.policy_forecasts import beyond_slo, choose_policy
from remoe.errors import InvalidRequestError
from remoe.moeless.function_balance import Policy
from remoe.plan import PolicyForecast, Slo
from remoe.topology import Topology
from tests.planner.test_what_if import optimising, preview
from tests.planner.worlds import World, ask

POLICIES: tuple[Policy, ...] = get_args(Policy)


def forecast(policy: Policy, *, tpot_s: float, resident_usd: float) -> PolicyForecast:
    return PolicyForecast(
        policy=policy,
        ttft_s=0.5,
        tpot_s=tpot_s / 2,
        slo_ttft_s=1.0,
        slo_tpot_s=tpot_s,
        cost_usd=1.0,
        resident_usd=resident_usd,
        held_gb=1.0,
        moved_in=0,
    )


FORECASTS = st.lists(
    st.builds(
        forecast,
        st.sampled_from(POLICIES),
        tpot_s=st.floats(0.001, 1.0),
        resident_usd=st.floats(1e-9, 1.0),
    ),
    min_size=1,
    unique_by=lambda one: one.policy,
)


@given(FORECASTS, st.floats(0.001, 1.0), st.floats(1.0, 10.0))
def test_the_choice_holds_the_slo_if_any_does_and_costs_least_of_those(
    forecasts: list[PolicyForecast], tpot_s: float, looser: float
) -> None:
    def cost(slo: Slo) -> tuple[bool, float]:
        policy = choose_policy(forecasts, slo)
        chosen = next(one for one in forecasts if one.policy == policy)
        return beyond_slo(chosen, slo) > 0, chosen.resident_usd

    slo = Slo(ttft_s=1.0, tpot_s=tpot_s)
    within = [one.resident_usd for one in forecasts if (one.slo_tpot_s or 0) <= tpot_s]
    late, resident_usd = cost(slo)
    assert late == (not within)
    if within:
        assert resident_usd == min(within)
        # An SLO that asks for less never costs more.
        assert cost(Slo(ttft_s=1.0, tpot_s=tpot_s * looser))[1] <= resident_usd


def test_without_an_slo_the_cheapest_is_chosen_and_of_equals_the_plan_as_it_is() -> None:
    same = [forecast(policy, tpot_s=0.1, resident_usd=1.0) for policy in POLICIES]
    assert choose_policy(same, None) == "remoe"
    cheaper = msgspec.structs.replace(same[1], resident_usd=0.5)
    assert choose_policy([same[0], cheaper, same[2]], None) == "moeless"
    assert choose_policy([], None) is None


def test_policies_are_compared_where_streams_are_said_and_times_are_known(world: World) -> None:
    planner = optimising(world)
    assert planner.plan(ask([1, 2, 3])).policies == []
    assert world.planner().preview(preview([1, 2, 3], streams=4)).policy is None
    asked = msgspec.structs.replace(ask([1, 2, 3]), streams=2)
    assert [one.policy for one in planner.plan(asked).policies] == list(POLICIES)
    for streams in (0, 65_537):
        with pytest.raises(InvalidRequestError) as caught:
            planner.preview(preview([1], streams=streams))
        assert caught.value.param == "streams"


def test_the_figures_are_those_of_the_partitions_that_policies_serve_with(world: World) -> None:
    planner = optimising(world)
    plan = planner.preview(preview([1, 2, 3], streams=1, ratio=0.5))
    remoe, moeless, joint = plan.policies
    inside = planner.preview(preview([1, 2, 3], ratio=0.0))  # there is room for all experts
    assert remoe.ttft_s == moeless.ttft_s == plan.predicted_ttft_s
    assert joint.ttft_s == inside.predicted_ttft_s
    assert remoe.tpot_s == pytest.approx(plan.predicted_tpot_s, rel=0.01)
    assert (remoe.moved_in, joint.moved_in) == (0, plan.partition.remote_count)
    functions = Topology.load(world.topology_path).experts
    held_gb = plan.main_memory_gb + sum(one.memory_gb for one in functions)
    assert remoe.held_gb == pytest.approx(held_gb)
    assert joint.held_gb == moeless.held_gb == pytest.approx(inside.main_memory_gb)
    # Nothing is held beside the main function, and nothing else computes.
    assert joint.resident_usd == pytest.approx(joint.cost_usd)
    assert remoe.resident_usd > remoe.cost_usd
    assert joint.resident_usd < moeless.resident_usd < remoe.resident_usd
    assert plan.policy == "joint"
    (why,) = (one for one in planner.explain(plan.plan_id).why if "Beside others" in one)
    assert "joint costs least" in why


def test_streams_share_the_bill_and_wait_for_each_other(world: World) -> None:
    planner = optimising(world)
    plans = [planner.preview(preview([1, 2], streams=n, ratio=0.5)) for n in (1, 4, 16)]
    for which in range(len(POLICIES)):
        of = [plan.policies[which] for plan in plans]
        assert of[0].tpot_s < of[1].tpot_s < of[2].tpot_s  # type: ignore[operator]
        assert of[0].resident_usd > of[1].resident_usd > of[2].resident_usd


def test_an_slo_that_only_the_dearer_policy_holds_has_it_chosen(world: World) -> None:
    """Beside sixteen others remote experts work side by side with local ones, and so are faster."""
    planner = optimising(world)
    planner.plan(ask([1]))
    planner.claim()  # it runs: no cold start is in the times
    free = planner.preview(preview([1, 2, 3], streams=16, ratio=0.5))
    remoe, _, joint = free.policies
    assert remoe.slo_tpot_s is not None
    assert joint.slo_tpot_s is not None
    assert remoe.slo_tpot_s < joint.slo_tpot_s
    assert free.policy == "joint"
    between = Slo(ttft_s=10.0, tpot_s=(remoe.slo_tpot_s + joint.slo_tpot_s) / 2)
    held = planner.preview(preview([1, 2, 3], streams=16, ratio=0.5, slo=between))
    assert held.policy == "remoe"
    assert "within the SLO" in " ".join(planner.explain(held.plan_id).why)
    tight = Slo(ttft_s=10.0, tpot_s=1e-5)
    late = planner.preview(preview([1, 2, 3], streams=16, ratio=0.5, slo=tight))
    assert late.policy == "remoe"
    assert "comes nearest to the SLO" in " ".join(planner.explain(late.plan_id).why)
