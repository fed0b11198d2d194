from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.arrivals import CONSTANT, POISSON, arrival_times
from loadgen.config import LoadConfig
from loadgen.rates import RateProfile, Stage
from loadgen.schedule import build_workload
from remoe.errors import SettingsError

rates = st.floats(0.1, 50)
stages = st.builds(Stage, rates, rates, st.floats(0.5, 60), st.booleans())
profiles = st.lists(stages, min_size=1, max_size=4).map(lambda found: RateProfile(tuple(found)))
families = st.sampled_from([0.2, POISSON, 4.0, CONSTANT])


def times(profile: RateProfile, burstiness: float, seed: int) -> list[float]:
    random = np.random.default_rng(seed)
    return list(arrival_times(profile, burstiness=burstiness, random=random))


@settings(max_examples=50, deadline=None)
@given(profile=profiles, burstiness=families, seed=st.integers(0, 2**32))
def test_arrivals_rise_within_the_profile_and_repeat_by_seed(
    profile: RateProfile, burstiness: float, seed: int
) -> None:
    found = times(profile, burstiness, seed)
    assert found == sorted(found)
    assert all(0 <= at <= profile.duration_s * (1 + 1e-9) for at in found)
    assert found == times(profile, burstiness, seed)


@given(stage=stages, share=st.floats(0, 1))
def test_the_inverse_of_the_integral_inverts_it(stage: Stage, share: float) -> None:
    count = share * stage.requests
    at = stage.time_of(count)
    assert 0 <= at <= stage.length_s * (1 + 1e-9)
    grid = np.linspace(0, at, 2001)
    integral = np.trapezoid([stage.rate_at(moment) for moment in grid], grid)
    assert integral == pytest.approx(count, rel=1e-4, abs=1e-6)


@given(profile=profiles)
def test_constant_arrivals_are_as_many_as_the_rate_says(profile: RateProfile) -> None:
    assert len(times(profile, CONSTANT, 0)) == int(np.ceil(profile.requests * (1 - 1e-12)))


@pytest.mark.parametrize(("burstiness", "cv"), [(POISSON, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_scatter_as_the_family_says(burstiness: float, cv: float) -> None:
    found = times(RateProfile.constant(20, 1000), burstiness, 1)
    gaps = np.diff(found)
    assert len(found) == pytest.approx(20_000, rel=5 * cv / 20_000**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_a_ramp_sends_more_later() -> None:
    found = np.array(times(RateProfile.parse("0..20@100s"), CONSTANT, 0))
    assert len(found) == 1000
    assert np.histogram(found, [0, 50, 100])[0].tolist() == [250, 750]


def test_stages_are_read_and_named() -> None:
    profile = RateProfile.parse("2@60s, 2..10@2m,1^16@0.5h")
    assert profile.stages == (
        Stage(2, 2, 60),
        Stage(2, 10, 120),
        Stage(1, 16, 1800, exponential=True),
    )
    assert [profile.stage_at(at) for at in (0, 59.9, 60, 200, 10**6)] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", "not like 2@60s"),
        ("fast@60s", "not like"),
        ("2@0s", "has no length"),
        ("0^4@10s", "cannot begin or end at 0"),
        ("0@10s", "rate 0"),
        ("1@10s,", "the stage ''"),
    ],
)
def test_bad_stages_are_explained(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        RateProfile.parse(text)


def test_synthetic_arrivals_take_the_traces_lengths_in_turn() -> None:
    config = LoadConfig(arrivals="constant", stages="10@10s")
    workload = build_workload(config)
    trace = build_workload(LoadConfig())
    lengths = [(r.prompt_tokens, r.output_tokens) for r in trace.requests]
    assert len(workload.requests) == 100
    assert [(r.prompt_tokens, r.output_tokens) for r in workload.requests] == (lengths * 4)[:100]
    assert workload == build_workload(config)


@pytest.mark.parametrize("arrivals", ["closed", "constant"])
def test_other_arrivals_send_the_traces_own_texts(tmp_path: Path, arrivals: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"arrival_s": 0, "prompt": "One.", "output_tokens": 3}\n'
        '{"arrival_s": 9, "prompt": "Two."}\n'
    )
    config = msgspec.convert(
        {
            "trace": str(path),
            "arrivals": arrivals,
            "requests": 5,
            "stages": "10@10s",
            "output_tokens": 7,
        },
        LoadConfig,
    )
    workload = build_workload(config)
    assert [r.prompt for r in workload.requests] == ["One.", "Two.", "One.", "Two.", "One."]
    assert {r.output_tokens for r in workload.requests} == {7}
    assert workload.borrowed == 0
    own = build_workload(msgspec.structs.replace(config, output_tokens=None))
    assert own.requests[0].output_tokens == 3
    assert own.borrowed == 2  # of the second text, sent twice


def test_fixed_lengths_and_limits() -> None:
    config = LoadConfig(prompt_tokens=40, max_output_tokens=10)
    workload = build_workload(config)
    assert {r.prompt_tokens for r in workload.requests} == {40}
    assert max(r.output_tokens for r in workload.requests) == 10
    longer = [r for r in build_workload(LoadConfig()).requests if r.output_tokens > 10]
    assert workload.cut == len(longer) > 0


def test_arrivals_without_lengths_borrow_them(tmp_path: Path) -> None:
    path = tmp_path / "functions.csv"
    path.write_text("app,func,end_timestamp,duration\na,f,1.0,0.5\na,f,9.0,0.5\n")
    workload = build_workload(LoadConfig(trace=str(path)))
    shipped = build_workload(LoadConfig()).requests
    assert [request.intended_s for request in workload.requests] == [0.0, 8.0]
    assert [r.output_tokens for r in workload.requests] == [r.output_tokens for r in shipped[:2]]
    assert workload.borrowed == 2
    with pytest.raises(SettingsError, match="no token counts; pass --lengths"):
        build_workload(LoadConfig(trace=str(path), lengths=str(path)))


def test_seeds_change_samples_and_arrivals() -> None:
    def plan(seed: int) -> list[float | None]:
        config = LoadConfig(arrivals="poisson", stages="5@10s", seed=seed)
        return [request.intended_s for request in build_workload(config).requests]

    assert plan(1) == plan(1) != plan(2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoadConfig(start_s=10_000), "nothing would be sent"),
        (LoadConfig(sample=0.0), "nothing would be sent"),
        (LoadConfig(arrivals="poisson"), "need --rate and --duration"),
    ],
)
def test_what_cannot_be_planned_is_refused(config: LoadConfig, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_workload(config)
