"""What is computed from records: statistics, objectives, summaries, bills, comparisons."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.compare import compare
from loadgen.measures import summarize
from loadgen.platform import platform_figures
from loadgen.plots.bill import ParetoPoint, pareto_front
from loadgen.receipt import Receipt
from loadgen.slo import Objective, judge, meets_all
from loadgen.statistics import Distribution
from loadgen.sweep import SweepPoint, knee_of, parse_rates
from loadgen.tables import number, warnings_of
from remoe.activation_totals import ActivationTotals
from remoe.errors import SettingsError
from tests.loadgen.records import platform_samples, receipt, record, result


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_distributions_are_numpys(values: list[float]) -> None:
    found = Distribution.of([*values, None], scale=2.0)
    data = 2 * np.array(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(data.mean())
    assert found.std == pytest.approx(data.std())
    assert [found.p50, found.p99] == pytest.approx(list(np.percentile(data, [50, 99])))
    assert (found.min, found.max) == (data.min(), data.max())


def test_latencies_of_one_request() -> None:
    one = record(3, sent_s=3.25, intended_s=3.0)
    assert (one.ttft_s, one.e2e_s, one.lag_s) == (0.25, 0.75, 0.25)
    assert one.tpot_s == pytest.approx((0.75 - 0.25) / 4)
    assert record(output_tokens=1).tpot_s is None
    assert record(output_tokens=None, chunks=3).tokens == 3
    assert record(status="failed").e2e_s is None


def test_a_summary_adds_up() -> None:
    records = [
        *(record(i) for i in range(8)),
        record(8, status="failed", error="http 500", error_detail="no", first_token_s=None),
        record(9, status="skipped", sent_s=None, last_s=None),
        record(99, warm_up=True, sent_s=-50.0, last_s=0.0),
    ]
    summary = summarize(records, planned=10, span_s=9.0, usd_per_hour=3600.0)
    requests = summary.requests
    assert (requests.completed, requests.failed, requests.skipped) == (8, 1, 1)
    assert summary.duration_s == 9.0
    assert requests.throughput_rps == pytest.approx(8 / 9)
    assert requests.offered_rps == pytest.approx(10 / 9)
    assert requests.errors[0].label == "http 500"
    assert requests.errors[0].examples == ["no"]
    assert (summary.tokens.output, summary.tokens.prompt) == (40, 880)
    assert summary.tokens.prompt_ratio == pytest.approx(1.1)
    assert summary.latency.ttft_ms.p50 == pytest.approx(500)
    assert summary.latency.itl_ms.n == 32
    assert summary.latency.lag_ms.n == 9
    assert summary.cost is not None
    assert summary.cost.total_usd == pytest.approx(9.0)
    assert summary.cost.per_million_output_tokens_usd == pytest.approx(9.0 / 40 * 1e6)
    assert (summary.cold_starts, summary.experts, summary.goodput_rps) == (None, None, None)


def test_what_users_waited_counts_from_the_schedule() -> None:
    """A sender that is late hides the wait in E2E, not in E2E from schedule."""
    late = [record(i, sent_s=i + 5.0, first_token_s=i + 5.5, last_s=i + 6.0) for i in range(4)]
    latency = summarize(late).latency
    assert latency.e2e_ms.p50 == pytest.approx(1000)
    assert latency.e2e_from_schedule_ms.p50 == pytest.approx(6000)
    assert latency.lag_ms.max == pytest.approx(5000)


def test_a_late_sender_is_a_warning() -> None:
    late = [record(i, sent_s=i + 0.2, first_token_s=i + 0.5) for i in range(4)]
    assert "late itself" in warnings_of(result(late))[0]
    assert warnings_of(result([record(i) for i in range(4)])) == []


def test_most_in_flight_does_not_count_a_follower() -> None:
    """A request that is sent when another ends takes its place."""
    assert summarize([record(i) for i in range(4)]).requests.most_in_flight == 1
    both = [record(0), record(1, sent_s=0.5)]
    assert summarize(both).requests.most_in_flight == 2


def test_the_bill_comes_from_receipts() -> None:
    records = [
        record(0, receipt=receipt()),
        record(1, receipt=receipt(cold_start_ms=0.0, remote_calls=30)),
        record(2, receipt=receipt(cost_usd=None, plan="degraded")),
        record(3),
    ]
    summary = summarize(records)
    cost, cold, experts = summary.cost, summary.cold_starts, summary.experts
    assert cost is not None
    assert cold is not None
    assert experts is not None
    assert cost.total_usd == pytest.approx(2e-4)
    assert cost.per_request_usd.n == 2
    # Only the tokens of requests that have a price.
    assert cost.per_million_output_tokens_usd == pytest.approx(2e-4 / 10 * 1e6)
    assert cost.predicted_over_actual == pytest.approx(2.0)
    assert "test-prices" in cost.source
    assert (cold.touched, cold.known) == (2, 3)
    assert cold.touched_share == pytest.approx(2 / 3)
    assert (cold.experts_ms.p50, cold.main_ms.n) == (250.0, 0)
    assert experts.remote_calls_per_token == pytest.approx(50 / 20)
    assert (experts.predicted_hit_rate, experts.hit_rate) == pytest.approx((0.7, 0.6))
    assert experts.degraded == 1


def test_the_platform_is_integrated_between_samples() -> None:
    figures = platform_figures(platform_samples(4))
    assert figures is not None
    # main: 4 s of 1 GB, idle in every other; experts: 1 GB from 2 s on, never busy.
    assert figures.resident_gb_s == pytest.approx(6.0)
    assert figures.idle_gb_s == pytest.approx(4.0)
    assert figures.idle_share == pytest.approx(4 / 6)
    assert (figures.cold_starts, figures.cold_start_total_ms) == (1, 300.0)
    assert figures.most_replicas == 2
    assert platform_figures(platform_samples(0)) is None


def test_counters_read_twice_say_what_came_between() -> None:
    before = ActivationTotals(requests=2, predicted=[[1.0, 2.0]], actual=[[2.0, 1.0]])
    after = ActivationTotals(requests=5, predicted=[[4.0, 2.5]], actual=[[3.0, 3.5]])
    assert after.since(before) == ActivationTotals(
        requests=3, predicted=[[3.0, 0.5]], actual=[[1.0, 2.5]]
    )


@pytest.mark.parametrize(
    ("text", "actual", "passed"),
    [
        ("ttft_p99<600ms", 0.5, True),
        ("ttft_p99<0.4s", 0.5, False),
        ("e2e_max<=1s", 1.0, True),
        ("tpot_mean<100ms", 0.125, False),
        ("itl_p50<1s", 0.1, True),
        ("ttft<1s", 0.8, False),  # one of five failed: not every request is within
        ("goodput>75%", 0.8, True),
        ("error_rate<=0.2", 0.2, True),
        ("error_rate<1%", 0.2, False),
        ("request_throughput>0.5", 0.8, True),
        ("cost_per_request<1", None, False),
    ],
)
def test_objectives_of_a_run(text: str, actual: float | None, passed: bool) -> None:
    records = [*(record(i) for i in range(4)), record(4, status="failed")]
    found = result(records, slo=[text]).summary.slo[0]
    assert found.passed is passed
    assert found.actual == (None if actual is None else pytest.approx(actual))


def test_a_goodput_objective_judges_bounds_on_requests() -> None:
    records = [record(i, first_token_s=i + (2.0 if i == 0 else 0.5)) for i in range(10)]
    assert not result(records, slo=["ttft<1s"]).summary.passed
    relaxed = result(records, slo=["ttft<1s", "goodput>=90%"]).summary
    assert relaxed.passed
    assert relaxed.goodput_share == pytest.approx(0.9)
    assert relaxed.goodput_rps == pytest.approx(0.9)


def test_a_request_with_one_token_cannot_break_tpot() -> None:
    assert meets_all(record(output_tokens=1), [Objective.parse("tpot<1ms")])
    assert not meets_all(record(), [Objective.parse("tpot<1ms")])


def test_nothing_measured_is_no_pass() -> None:
    objectives = [Objective.parse("ttft_p99<2s"), Objective.parse("ttft<2s")]
    assert [found.passed for found in judge([], objectives, {})] == [False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft_p99<2", "needs a unit"),
        ("ttft_p99>2s", "upper bound"),
        ("speed<2s", "not understood"),
        ("goodput_p99>1%", "no percentiles"),
        ("itl<5ms", "write itl_p99"),
        ("", "not understood"),
    ],
)
def test_objectives_that_mean_nothing_are_explained(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Objective.parse(text)


def noisy(factor: float, seed: int, n: int = 200) -> list[Receipt]:
    random = np.random.default_rng(seed)
    return [receipt(cost_usd=factor * value) for value in random.lognormal(-9, 0.3, n)]


def run_of(factor: float, seed: int, name: str = "run") -> object:
    random = np.random.default_rng(seed)
    waits = factor * random.lognormal(-1, 0.4, 200)
    records = [
        record(i, first_token_s=i + wait, last_s=i + wait + 0.5, receipt=bill)
        for i, (wait, bill) in enumerate(zip(waits, noisy(factor, seed), strict=True))
    ]
    return result(records, name=name)


def test_a_real_difference_is_seen_and_chance_is_not() -> None:
    same = compare(run_of(1, 1), run_of(1, 2, "again"))  # type: ignore[arg-type]
    slower = compare(run_of(1, 1), run_of(1.5, 2, "slower"))  # type: ignore[arg-type]
    by_name = {difference.name: difference for difference in slower.differences}
    assert not any(difference.differs for difference in same.differences)
    for name in ("TTFT mean, ms", "TTFT p50, ms", "cost of a request, µ$"):
        assert by_name[name].differs
        assert by_name[name].low < 1.5 < by_name[name].high
    assert slower.table().rows[0][-1] == "more"
    again = compare(run_of(1, 1), run_of(1.5, 2, "slower"))  # type: ignore[arg-type]
    assert again.differences == slower.differences


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_run_against_itself_has_ratio_one(seed: int) -> None:
    run = run_of(1, seed)
    for difference in compare(run, run, resamples=200).differences:  # type: ignore[arg-type]
        assert difference.ratio == 1.0
        assert difference.low <= 1.0 <= difference.high


def test_what_is_not_comparable_is_said() -> None:
    first = result([record(i) for i in range(3)], name="a")
    second = result([record(0), record(1, status="failed"), record(2)], name="b")
    assert compare(first, second, resamples=100).notes == [
        "b: 1 of 3 requests did not complete and are not compared."
    ]


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), max_size=12))
def test_the_pareto_front_is_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    points = [ParetoPoint(str(i), *pair) for i, pair in enumerate(pairs)]
    front = pareto_front(points)

    def beats(one: ParetoPoint, other: ParetoPoint) -> bool:
        return (
            one.latency_s <= other.latency_s
            and one.cost_usd <= other.cost_usd
            and (one.latency_s, one.cost_usd) != (other.latency_s, other.cost_usd)
        )

    assert not any(beats(point, kept) for kept in front for point in points)
    assert all(
        any(beats(kept, point) for kept in front)
        or point in front
        or any(
            (kept.latency_s, kept.cost_usd) == (point.latency_s, point.cost_usd) for kept in front
        )
        for point in points
    )


def test_sweeps_rise_and_stop_at_the_knee() -> None:
    assert list(parse_rates("1,2.5,4")) == [1, 2.5, 4]
    assert [rate for rate, _ in zip(parse_rates("auto:3"), range(3), strict=False)] == [3, 6, 12]
    for text in ("2,1", "0,1", "fast", "auto:fast", "auto:0"):
        with pytest.raises(SettingsError):
            parse_rates(text)
    run = result([record()])
    points = [SweepPoint(1, run, None), SweepPoint(2, run, None), SweepPoint(4, run, "slow")]
    knee = knee_of(points)
    assert knee is not None
    assert knee.rate_rps == 2
    assert knee_of(points[2:]) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (1234.0, "1,234"),
        (0.00012346, "0.0001235"),
        (12345.678, "12,346"),
        (5.452, "5.452"),
    ],
)
def test_numbers_have_enough_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown
