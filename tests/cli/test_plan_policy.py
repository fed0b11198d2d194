"""`remoe plan --policy`: what the policies would do, in figures that add up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from knative.deployment import DeploymentOptions, default_deployment
from remoe.checkpoint import Checkpoint
from remoe.cli.plan_policy import policy_sentences
from remoe.experts import Partition
from remoe.plan import Plan
from remoe.topology import Topology


@pytest.fixture
def topology(tiny_model_dir: Path) -> Topology:
    deployment = default_deployment(
        DeploymentOptions(model_dir=tiny_model_dir, threads=2, layers_per_function=2)
    )
    return deployment.topology({spec.name: "http://127.0.0.1:1" for spec in deployment.functions})


def _plan(topology: Topology, profile: list[list[float]], main_memory_gb: float) -> Plan:
    checkpoint = Checkpoint.open(Path(topology.model_dir))
    return Plan(
        plan_id="p",
        model=topology.model,
        model_digest=checkpoint.digest,
        partition=Partition(checkpoint.experts, ((2, 3),) * checkpoint.layers),
        profile=profile,
        main_memory_gb=main_memory_gb,
        functions=[],
        prewarm=[],
        neighbours=[],
        predicted_ttft_s=None,
        predicted_tpot_s=None,
        predicted_cost_usd=None,
    )


def test_loaded_experts_move_in_and_functions_keep_nothing(topology: Topology) -> None:
    plan = _plan(topology, [[0.25] * 4] * 3, main_memory_gb=0.0)
    text = " ".join(policy_sentences("joint", plan, topology, streams=8))
    assert "6 experts move into the main function" in text
    assert "keep 0 replicas and 0.00 GB, where the policy remoe keeps 2" in text
    assert "vary by 0.00" in text


def test_without_room_they_stay_and_a_function_without_load_sleeps(topology: Topology) -> None:
    hot, unused = [0.1, 0.1, 0.7, 0.1], [0.5, 0.5, 0.0, 0.0]
    plan = _plan(topology, [hot, hot, unused], main_memory_gb=topology.main_memory_gb)
    text = " ".join(policy_sentences("moeless", plan, topology, streams=8))
    assert "0 experts move" in text
    assert "keep 1 replicas" in text
    before, after = re.findall(r"by (\d\.\d\d)", text)
    assert float(after) < float(before)
    (remoe,) = policy_sentences("remoe", plan, topology, streams=8)
    assert "1 of 2 expert functions are called" in remoe
