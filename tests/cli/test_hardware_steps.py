"""What whole steps of decoding tell of the dense part and of calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.steps import StepTimes, measure_steps
from remoe.hardware import Spread


def test_a_step_is_taken_apart_and_adds_up_again(tiny_model_dir: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    layers, hits = len(checkpoint.moe_layers), checkpoint.top_k
    times = StepTimes(local_s=1.0, remote_s=3.0)
    dense_s = times.dense_s(checkpoint, local_s=0.01)
    assert dense_s == pytest.approx(1.0 - layers * hits * 0.01)
    call_s = times.call_s(checkpoint, dense_s=dense_s, remote_s=0.02)
    assert dense_s + layers * (call_s + hits * 0.02) == pytest.approx(3.0)


def test_experts_slower_alone_than_in_a_step_leave_the_dense_part_its_bytes(
    tiny_model_dir: Path,
) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    routed = len(checkpoint.moe_layers) * checkpoint.top_k * checkpoint.expert_size_bytes
    dense = checkpoint.non_expert_size_bytes
    found = StepTimes(local_s=1.0, remote_s=1.0).dense_s(checkpoint, local_s=1e3)
    assert found == pytest.approx(dense / (dense + routed))


def test_real_steps_take_longer_with_every_expert_remote(tiny_model_dir: Path) -> None:
    times = measure_steps(tiny_model_dir)
    assert 0 < times.local_s < times.remote_s


def test_a_spread_moves_as_a_whole() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert spread.plus(1.0) == Spread.of([2.0, 3.0, 4.0])
