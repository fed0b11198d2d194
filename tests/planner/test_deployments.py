from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from planner.deployments import EPOCH, REQUEST, Deployments
from remoe.experts import Partition
from remoe.plan import Deployment, Plan
from tests.planner.worlds import ToldClock

WINDOW_S = 30.0
PARTITION = Partition(experts=2, remote=((1,),))


def plan(plan_id: str) -> Plan:
    return Plan(
        plan_id=plan_id,
        model="m",
        model_digest="d",
        partition=PARTITION,
        profile=[[0.5, 0.5]],
        main_memory_gb=1.5,
        functions=[],
        prewarm=[],
        neighbours=[],
        predicted_ttft_s=None,
        predicted_tpot_s=None,
        predicted_cost_usd=None,
    )


def epoch() -> Deployment:
    return Deployment(
        plan_id="epoch", model_digest="d", partition=PARTITION, main_memory_gb=3.0, origin=EPOCH
    )


def test_a_claim_takes_over_what_the_plan_says() -> None:
    deployments = Deployments(window_s=WINDOW_S, clock=ToldClock())
    deployments.planned(plan("a"))
    assert deployments.claim(epoch) == Deployment(
        plan_id="a",
        model_digest="d",
        partition=PARTITION,
        main_memory_gb=1.5,
        origin=REQUEST,
        profile=plan("a").profile,
    )


class ClaimsAndReleases(RuleBasedStateMachine):
    """Against a model that keeps every plan ever made, with its time and whether it was claimed."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ToldClock()
        self.deployments = Deployments(window_s=WINDOW_S, clock=self.clock)
        self.plans: list[tuple[float, str]] = []
        self.claimed: set[str] = set()
        self.current: str | None = None

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def plan(self) -> None:
        plan_id = f"plan-{len(self.plans)}"
        self.plans.append((self.clock.now, plan_id))
        self.deployments.planned(plan(plan_id))

    @rule()
    def claim(self) -> None:
        recent = [
            plan_id
            for made_at, plan_id in self.plans
            if made_at >= self.clock.now - WINDOW_S and plan_id not in self.claimed
        ]
        deployment = self.deployments.claim(epoch)
        assert deployment.plan_id == (recent[-1] if recent else "epoch")
        assert deployment.origin == (REQUEST if recent else EPOCH)
        self.claimed.update(recent[-1:])
        self.current = deployment.plan_id

    @rule()
    def release(self) -> None:
        assert self.deployments.release() == (self.current is not None)
        self.current = None

    @rule(plan_id=st.sampled_from(["epoch", "plan-0", "plan-1", "plan-2"]))
    def release_by_name(self, plan_id: str) -> None:
        hit = self.current == plan_id
        assert self.deployments.release(plan_id) == hit
        self.current = None if hit else self.current

    @invariant()
    def the_current_deployment_is_the_last_claimed_and_not_released(self) -> None:
        current = self.deployments.current
        assert (current and current.plan_id) == self.current


TestClaimsAndReleases = ClaimsAndReleases.TestCase
TestClaimsAndReleases.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
