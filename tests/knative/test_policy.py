"""Annotations mean what they mean to Knative, and a mistake in one is an error that helps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.durations import format_duration, parse_duration
from knative.policy import AUTOSCALING, PROGRESS_DEADLINE, ScalingPolicy
from knative.spec import FunctionSpec
from remoe.errors import SettingsError


def policy(**values: str) -> ScalingPolicy:
    return ScalingPolicy.from_annotations(
        {AUTOSCALING + key.replace("_", "-"): value for key, value in values.items()}
    )


def test_the_defaults_are_knatives() -> None:
    assert policy() == ScalingPolicy(
        min_scale=0,
        max_scale=0,
        initial_scale=1,
        activation_scale=1,
        target=None,
        target_utilization_percentage=70,
        target_burst_capacity=211,
        window_s=60,
        panic_window_percentage=10,
        panic_threshold_percentage=200,
        retention_s=0,
        scale_down_delay_s=0,
        progress_deadline_s=600,
    )
    assert policy().target_concurrency(0) == 70


def test_all_annotations_are_read() -> None:
    read = policy(
        min_scale="1",
        max_scale="5",
        initial_scale="0",
        activation_scale="2",
        target="4.5",
        target_utilization_percentage="80",
        target_burst_capacity="-1",
        window="1m30s",
        panic_window_percentage="20",
        panic_threshold_percentage="150",
        scale_to_zero_pod_retention_period="10m",
        scale_down_delay="15s",
    )
    assert (read.min_scale, read.max_scale, read.initial_scale, read.activation_scale) == (
        1,
        5,
        0,
        2,
    )
    assert (read.window_s, read.panic_window_s) == (90, 18)
    assert (read.retention_s, read.scale_down_delay_s) == (600, 15)
    assert read.target_concurrency(0) == pytest.approx(3.6)


@pytest.mark.parametrize(
    ("container_concurrency", "target", "expected"),
    [(0, None, 70.0), (10, None, 7.0), (10, "4", 2.8), (2, "4", 1.4), (0, "0.01", 0.01)],
)
def test_the_lower_of_target_and_limit_governs(
    container_concurrency: int, target: str | None, expected: float
) -> None:
    read = policy(target=target) if target else policy()
    assert read.target_concurrency(container_concurrency) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("window", "5s", "6s to 1h"),
        ("window", "2h", "6s to 1h"),
        ("window", "6500ms", "whole number of seconds"),
        ("window", "60", "write it like 60s"),
        ("min-scale", "-1", "whole number of at least 0"),
        ("min-scale", "one", "whole number"),
        ("activation-scale", "1", "at least 2"),
        ("target", "0", "at least 0.01"),
        ("target", "nan", "out of range"),
        ("target-utilization-percentage", "101", "1 to 100"),
        ("target-burst-capacity", "-2", "at least 0"),
        ("panic-threshold-percentage", "100", "110 to 1000"),
        ("scale-down-delay", "61m", "0s to 1h"),
        ("metric", "rps", "can only be 'concurrency'"),
        ("class", "hpa.autoscaling.knative.dev", "can only be"),
        ("scale-to-zero-grace", "30s", "unknown annotation"),
        ("min-scales", "1", "did you mean autoscaling.knative.dev/min-scale?"),
    ],
)
def test_a_bad_annotation_is_named_with_what_it_may_be(key: str, value: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        ScalingPolicy.from_annotations({AUTOSCALING + key: value})
    assert key in caught.value.message


def test_bounds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SettingsError, match="max-scale 1 is less than min-scale 2"):
        policy(min_scale="2", max_scale="1")
    with pytest.raises(SettingsError, match="activation-scale 3"):
        policy(activation_scale="3", max_scale="2")


def test_annotations_of_other_parts_pass() -> None:
    annotations = {
        "queue.sidecar.serving.knative.dev/cpu-resource-request": "100m",
        "example.com/plan": "x",
        PROGRESS_DEADLINE: "20m",
    }
    assert ScalingPolicy.from_annotations(annotations).progress_deadline_s == 1200
    with pytest.raises(SettingsError, match="did you mean"):
        ScalingPolicy.from_annotations({"serving.knative.dev/progress-deadlin": "20m"})


def test_a_functions_error_names_the_function() -> None:
    spec = FunctionSpec(name="expert", module="expert_fn", annotations={AUTOSCALING + "window": ""})
    with pytest.raises(SettingsError, match=r"^expert: annotation .*window"):
        spec.policy()


@pytest.mark.parametrize("name", ["Upper", "9lives", "a_b", "end-", "a" * 46, ""])
def test_a_name_that_is_no_dns_label_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="function name"):
        FunctionSpec(name=name, module="m")


@given(st.integers(0, 100_000))
def test_durations_survive_writing_and_reading(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.text("0123456789.hms ", max_size=8))
def test_a_duration_is_read_or_refused(text: str) -> None:
    try:
        assert parse_duration(text) >= 0
    except ValueError as error:
        assert "60s" in str(error)  # noqa: PT017  # both outcomes are right
