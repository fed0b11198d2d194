"""The MoEless simulator: formulas by hand, traffic that loses no token, memory that adds up."""

from __future__ import annotations

import numpy as np
import pytest

from planner.moeless.hardware import ExpertMachine, fit_line
from planner.moeless.policies import Eplb, ExpertParallel, Moeless, MoelessKnobs, Oracle, Policy
from planner.moeless.residency import LayerResidency
from planner.moeless.simulation import Outcome, Setting, simulate
from planner.moeless.token_routes import TokenRoutes, synthetic_routes
from planner.moeless.traffic import Batch, Request, Step, make_batches, steps_of
from remoe.moeless.placement import Placement
from remoe.moeless.scaler import load_cv

MACHINE = ExpertMachine(row_s=1e-3, route_s=1e-4, expert_bytes=10.0, misc_s=0.5, misc_bytes=3.0)


def test_layer_time_is_the_formulas() -> None:
    placement = Placement(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]), 2)
    loads = np.array([40.0, 10, 6])
    took = MACHINE.layer_time(placement, loads, gpus=2)
    # The largest replica has 20 rows; GPU 1 has 20 + 10 + 6, moved there and back.
    assert took.paper_s == pytest.approx(20e-3 + 2 * 36e-4)
    assert took.serial_s == pytest.approx(36e-3 + 2 * 36e-4)
    slow_start = ExpertMachine(row_s=1e-3, route_s=0, expert_bytes=1, start_s=0.1)
    assert slow_start.layer_time(placement, loads, gpus=2).serial_s == pytest.approx(0.336)
    # An expert without a token is not started.
    assert slow_start.layer_time(placement, np.array([40.0, 10, 0]), gpus=2).serial_s == (
        pytest.approx(0.23)
    )


def test_fit_finds_start_and_slope_and_neither_is_negative() -> None:
    rows = np.array([1.0, 4, 16, 64, 256])
    assert fit_line(rows, 2e-4 + 3e-5 * rows) == pytest.approx((2e-4, 3e-5))
    start, slope = fit_line(rows, 1e-5 * rows**1.2)
    assert start == 0
    assert slope > 0
    start, slope = fit_line(rows, 1e-3 / rows)
    assert start > 0
    assert slope == 0


def _routes(prompt: list[int], decoded: list[bool], experts: list[int]) -> TokenRoutes:
    """Tokens of one layer and top-1."""
    routes = np.array(experts, np.uint16)[:, None, None]
    topics = ["t"] * (max(prompt) + 1)
    return TokenRoutes(routes, {1: routes}, np.array(prompt), np.array(decoded), 4, topics)


def test_a_request_takes_its_prompts_routes_in_turn() -> None:
    tokens = _routes([0, 0, 0, 0, 1], [False, False, True, True, False], [0, 1, 2, 3, 1])
    batch = Batch(1.0, [Request(0, 5, 4), Request(1, 2, 3)])
    steps = list(steps_of(batch, tokens, distance=1))
    # Five tokens read of two recorded: 0 1 0 1 0. The first answer token comes with the prefill.
    assert steps[0].loads.tolist() == [[3, 2 + 2, 0, 0]]
    # Prompt 0 decodes 2, 3, 2; prompt 1 was answered with nothing and repeats its last token.
    assert [step.loads[0].tolist() for step in steps[1:]] == [
        [0, 1, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 0],
    ]
    assert [step.prefill for step in steps] == [True, False, False, False]
    strided = list(steps_of(batch, tokens, distance=1, stride=2))
    assert [step.weight for step in strided] == [1, 2, 1]
    assert strided[2].loads.tolist() == steps[3].loads.tolist()
    assert not steps[0].predicted.any()  # layer 0 has none at distance 1


def test_requests_of_one_second_are_one_batch() -> None:
    arrivals = [(0.1, 10, 2), (0.9, 20, 3), (2.0, 30, 4)]
    batches = make_batches(arrivals, [7])
    assert [(batch.start_s, len(batch.requests)) for batch in batches] == [(1.0, 2), (3.0, 1)]
    assert batches[1].requests == [Request(7, 30, 4)]


def test_residency_counts_idle_time_up_to_the_keep_alive() -> None:
    layer = LayerResidency(2, keep_alive_s=10)
    both = Placement(np.array([0, 1]), np.array([0, 1]), 2)
    first = Placement(np.array([0]), np.array([0]), 2)
    assert layer.use(both, 0.0) == [0, 1]
    assert layer.use(first, 4.0) == []
    assert layer.until(8.0) == pytest.approx(8 + 8)
    assert len(layer.warm(12.0).expert) == 1  # expert 1 died at 10
    assert layer.use(both, 13.0) == [1]
    assert layer.until(13.0) == pytest.approx(13 + 10)


def test_a_full_gpu_lets_go_of_what_was_used_longest_ago() -> None:
    layer = LayerResidency(1, keep_alive_s=100, room=2)
    for now_s, expert in enumerate([0, 1, 2]):
        assert layer.use(Placement(np.array([expert]), np.array([0]), 1), float(now_s)) == [0]
    assert sorted(layer.warm(2.0).expert.tolist()) == [1, 2]
    assert layer.until(2.0) == pytest.approx(2 + 1 + 0)  # expert 0 left when 2 came


def _replay(policy: Policy, steps: list[Step], machine: ExpertMachine = MACHINE) -> Outcome:
    batches = [Batch(1.0, []), Batch(100.0, [])]
    setting = Setting(machine=machine, gpus=2, keep_alive_s=20)
    return simulate(
        batches, lambda batch: steps if batch.start_s == 1 else steps[:1], policy, setting
    )


def test_costs_and_times_of_a_serverful_policy_by_hand() -> None:
    loads = np.array([[30.0, 10], [10, 10]])
    steps = [Step(loads, loads, 1.0, prefill=True), Step(loads, loads, 3.0, prefill=False)]
    outcome = _replay(ExpertParallel(layers=2, experts=2, gpus=2), steps)
    layer_s = np.array([30e-3 + 60e-4, 10e-3 + 20e-4])
    assert outcome.paper_s == pytest.approx(np.tile(layer_s, 3))
    assert outcome.weight.tolist() == [1, 1, 3, 3, 1, 1]
    assert outcome.mean(outcome.paper_s) == pytest.approx(layer_s.mean())
    steps_run = 1 + 3 + 1
    assert outcome.executing == pytest.approx(steps_run * (layer_s.sum() * 20 + 2 * 0.5 * 3))
    assert outcome.proxy == pytest.approx(steps_run * (layer_s.sum() * 40 + 2 * 0.5 * 3))
    span_s = 99 + layer_s.sum() + 1
    assert outcome.span_s == pytest.approx(span_s)
    assert outcome.resident == pytest.approx(span_s * (4 * 10 + 2 * 3))
    assert outcome.cold_share == 0


def test_serverless_replicas_are_charged_for_their_keep_alive() -> None:
    loads = np.array([[10.0, 10]])
    machine = ExpertMachine(row_s=1e-3, route_s=0, expert_bytes=10.0, attach_bytes_per_s=2.0)
    policy = Moeless(loads / 20, MoelessKnobs(gpus=2, most_added=2))
    outcome = _replay(policy, [Step(loads, loads, 1.0, prefill=True)], machine)
    # Each batch starts both replicas cold, side by side: 5 s each, known since the pass began.
    assert outcome.stall_s == pytest.approx([5, 5])
    assert outcome.cold_share == 1
    # Two replicas for 20 s from 1 s on; again at 100 s, until the end 5.01 s later.
    assert outcome.resident == pytest.approx(2 * 10 * (20 + 5.01))


def test_starts_known_early_enough_are_hidden() -> None:
    loads = np.ones((3, 2))
    machine = ExpertMachine(
        row_s=1e-3, route_s=0, expert_bytes=1.0, misc_s=2.0, attach_bytes_per_s=1 / 3
    )
    policy = Moeless(loads / 2, MoelessKnobs(gpus=2, most_added=0))
    steps = [Step(loads, loads, 1.0, prefill=True)]
    stall = {}
    for distance in (1, 2):
        setting = Setting(machine=machine, gpus=2, distance=distance)
        outcome = simulate([Batch(0.0, [])], lambda _: steps, policy, setting)
        stall[distance] = outcome.stall_s.tolist()
    # A start takes 3 s, a layer 2.001; the wait for the first one gives the second its time.
    assert stall[1] == pytest.approx([3, 0, 3 - 2.001])
    assert stall[2] == pytest.approx([3, 0, 0])


@pytest.fixture(scope="module")
def skewed() -> TokenRoutes:
    return synthetic_routes(
        layers=3, experts=8, top_k=2, zipf=1.0, topical=0.8, accuracy=1.0, prompts=20
    )


def _compare(tokens: TokenRoutes, policies: dict[str, Policy]) -> dict[str, Outcome]:
    arrivals = [(second / 4, 300, 6) for second in range(24)]
    batches = make_batches(arrivals, range(20))
    steps = {batch.start_s: list(steps_of(batch, tokens, distance=1)) for batch in batches}
    setting = Setting(
        machine=ExpertMachine(row_s=1e-5, route_s=1e-6, expert_bytes=1e6, attach_bytes_per_s=1e10),
        gpus=8,
        room=4,
    )
    return {
        name: simulate(batches, lambda batch: steps[batch.start_s], policy, setting)
        for name, policy in policies.items()
    }


def test_moeless_balances_skewed_loads_and_each_part_matters(skewed: TokenRoutes) -> None:
    history = skewed.mean_loads()

    def moeless(*, predictor: bool = True, scaler: bool = True, placer: bool = True) -> Moeless:
        knobs = MoelessKnobs(
            gpus=8,
            most_added=8,
            room=[4] * 8,
            predictor=predictor,
            scaler=scaler,
            placer=placer,
        )
        return Moeless(history, knobs)

    outcomes = _compare(
        skewed,
        {
            "ep": ExpertParallel(layers=3, experts=8, gpus=8),
            "eplb": Eplb(history, gpus=8, redundant=8),
            "oracle": Oracle(layers=3, experts=8, gpus=8),
            "moeless": moeless(),
            "no predictor": moeless(predictor=False),
            "no scaler": moeless(scaler=False),
            "no placer": moeless(placer=False),
        },
    )
    mean = {name: outcome.mean(outcome.paper_s) for name, outcome in outcomes.items()}
    assert mean["moeless"] < 0.8 * mean["ep"]
    assert mean["moeless"] < mean["no predictor"]
    assert mean["moeless"] < mean["no scaler"]
    # The placer's warm places save starts; balance alone is no worse without it.
    assert outcomes["moeless"].cold_share < outcomes["no placer"].cold_share
    assert mean["oracle"] < mean["ep"]
    assert outcomes["moeless"].mean_cv < outcomes["ep"].mean_cv
    assert outcomes["moeless"].proxy < outcomes["ep"].proxy
    # The router's loads are served whole, but for the Oracle.
    assert outcomes["oracle"].mean_cv == 0


def test_eplb_learns_from_its_last_period() -> None:
    policy = Eplb(np.array([[1.0, 1, 1, 1]]), gpus=2, redundant=2, period_s=10)
    from planner.moeless.policies import LayerView

    def view(now_s: float) -> LayerView:
        loads = np.array([0.0, 90, 5, 5])
        empty = Placement(np.array([], np.intp), np.array([], np.intp), 2)
        return LayerView(0, now_s, loads, loads, loads, empty)

    before, _ = policy.place(view(0.0))
    assert before.replicas(4).tolist() == [2, 2, 1, 1]
    after, _ = policy.place(view(11.0))
    assert after.replicas(4).tolist() == [1, 3, 1, 1]
    assert policy.held() == 6


def test_a_prior_outvotes_a_prediction_of_few_routes() -> None:
    history = np.array([[0.7, 0.1, 0.1, 0.1]])
    predicted = np.array([[0.0, 2, 1, 1]])  # as it happens, wrong
    true = np.array([[3.0, 1, 0, 0]])

    def replicas(prior_routes: float) -> float:
        knobs = MoelessKnobs(gpus=2, most_added=1, prior_routes=prior_routes)
        outcome = _replay(Moeless(history, knobs), [Step(true, predicted, 1.0, prefill=True)])
        return float(outcome.paper_s[0])

    assert replicas(20) < replicas(0)


def test_experts_at_zero_are_started_when_tokens_come_after_all() -> None:
    knobs = MoelessKnobs(gpus=2, most_added=4, scale_to_zero=True)
    policy = Moeless(np.ones((1, 3)), knobs)
    true, predicted = np.array([[4.0, 0, 2]]), np.array([[4.0, 4, 0]])
    outcome = _replay(policy, [Step(true, predicted, 1.0, prefill=True)])
    assert outcome.mean_replicas == 3  # two predicted, and expert 2 after all
    assert load_cv(true[0], np.array([1, 1, 1])) == pytest.approx(outcome.mean_cv)


def test_synthetic_routes_are_as_skewed_and_as_well_foretold_as_asked() -> None:
    even = synthetic_routes(layers=2, experts=8, top_k=1, zipf=0, accuracy=1)
    steep = synthetic_routes(layers=2, experts=8, top_k=1, zipf=1, accuracy=0.5)
    assert np.abs(even.mean_loads() - 1 / 8).max() < 0.01
    harmonic = 1 / np.arange(1, 9)
    expected = harmonic / harmonic.sum()
    assert np.sort(steep.mean_loads()[0])[::-1] == pytest.approx(expected, abs=0.02)
    assert np.array_equal(even.predicted[1], even.routes)
    same = (steep.predicted[1] == steep.routes).mean()
    assert same == pytest.approx(0.5 + 0.5 * (expected**2).sum(), abs=0.03)
    some = steep.only(np.arange(200) < 3)
    assert len(some.routes) == 3 * 64
    assert some.prompt.max() == 2
