"""What an SLO does to a deployment before there is any cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from remoe.checkpoint import Checkpoint
from remoe.cli.cluster_options import Described, describe
from remoe.errors import SettingsError
from tests.remoe.hardware_profiles import some_profile


@pytest.fixture
def measured(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a hardware profile of the model."""
    digest = Checkpoint.open(tiny_model_dir).digest
    some_profile(model=tiny_model_dir.name, model_digest=digest).save(tmp_path)
    monkeypatch.setenv("REMOE_HOME", str(tmp_path))
    return tiny_model_dir


def variables(described: Described, name: str) -> dict[str, str]:
    (service,) = (
        one for one in described.release.services if one["metadata"]["name"].endswith(name)
    )
    env = service["spec"]["template"]["spec"]["containers"][0]["env"]
    return {one["name"]: one["value"] for one in env if "value" in one}


def test_an_slo_settles_the_share_of_remote_experts(measured: Path) -> None:
    described = describe(str(measured), slo="ttft=10,tpot=1", weights="image:/m")
    assert described.plan is not None
    assert described.plan.status == "feasible"
    remote = max(len(layer) for layer in described.plan.partition.remote)
    env = variables(described, "planner")
    assert env["REMOE_PLANNER_RATIO_RULE"] == "fixed"
    ratio = float(env["REMOE_PLANNER_REMOTE_RATIO"])
    assert int(ratio * described.plan.partition.experts) == remote
    assert env["REMOE_PLANNER_HARDWARE"] == "/etc/remoe/hardware.json"
    expected = described.expectation
    assert expected is not None
    assert expected.ttft_s is not None
    assert 0 < expected.ttft_s < 10


def test_the_largest_share_that_holds_gives_the_smallest_main_function(measured: Path) -> None:
    def ratio(rule: Literal["cost", "largest"], slo: str) -> float:
        described = describe(str(measured), slo=slo, ratio_rule=rule, weights="image:/m")
        return float(variables(described, "planner")["REMOE_PLANNER_REMOTE_RATIO"])

    loose = "ttft=100,tpot=10"
    assert ratio("largest", loose) == 0.5  # all that may be remote
    assert ratio("largest", loose) > ratio("cost", loose)
    assert ratio("largest", "ttft=100,tpot=0.008") == 0.25
    assert ratio("largest", "ttft=100,tpot=0.007") == 0


def test_an_operator_says_how_often_the_planner_adapts(measured: Path) -> None:
    name = "REMOE_PLANNER_ADAPT_EVERY_S"
    assert name not in variables(describe(str(measured), weights="image:/m"), "planner")
    never = describe(str(measured), adapt_every=0, weights="image:/m")
    assert variables(never, "planner")[name] == "0"


def test_a_burst_capacity_is_the_expert_functions(measured: Path) -> None:
    described = describe(str(measured), burst_capacity=-1, weights="image:/m")
    found = {
        one["metadata"]["name"].rpartition("-")[2]: one["spec"]["template"]["metadata"][
            "annotations"
        ]["autoscaling.knative.dev/target-burst-capacity"]
        for one in described.release.services
    }
    assert found.pop("l02") == "-1"
    assert set(found.values()) == {"0"}


def test_an_slo_that_no_plan_holds_is_refused_with_what_plans_reach(measured: Path) -> None:
    with pytest.raises(SettingsError, match=r"reach, .* is ttft=\S+ and tpot=\S+\. Ask"):
        describe(str(measured), slo="ttft=0.000001,tpot=0.000001", weights="image:/m")


def test_without_a_profile_nothing_is_predicted(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOE_HOME", str(tmp_path))
    described = describe(str(tiny_model_dir), slo="ttft=1,tpot=1", weights="image:/m")
    assert described.expectation is None
    assert "REMOE_PLANNER_RATIO_RULE" not in variables(described, "planner")
