"""What a main function's memory costs with a GPU: its price for what is on it alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from main_model_fn.gpu_memory import GpuMemory
from main_model_fn.hot_experts import HotBudget
from main_model_fn.live_partition import LivePartition
from main_model_fn.metering import Span
from remoe.checkpoint import Checkpoint
from remoe.experts import Partition
from tests.main_model_fn.test_live_partition import deployment_of
from tests.tiny_model import EXPERTS, LAYERS, InProcessTransport, new_meter, split


def test_the_dense_part_the_cache_and_hot_experts_are_on_the_gpu(tiny_model_dir: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    partition = Partition(EXPERTS, ((3,),) * LAYERS)
    profile = [[0.1, 0.6, 0.2, 0.1]] * LAYERS
    room = LAYERS * checkpoint.expert_size_bytes  # for one of each layer
    item = checkpoint.expert_size_bytes // sum(
        tensor.values.size for tensor in checkpoint.expert(next(iter(partition.remote_ids()))).all()
    )
    memory = GpuMemory.of(
        checkpoint, partition, kv_tokens=100, hot=HotBudget(room, profile), item_bytes=item
    )
    fixed_bytes = checkpoint.non_expert_size_bytes + 100 * checkpoint.kv_bytes_per_token
    assert memory.gb(partition) == pytest.approx((fixed_bytes + room) / 1e9)
    # Hot experts that are let go leave it, cold ones never were there.
    assert memory.gb(Partition(EXPERTS, ((1, 3),) * LAYERS)) == pytest.approx(fixed_bytes / 1e9)
    assert memory.gb(Partition(EXPERTS, ((0, 3),) * LAYERS)) == memory.gb(partition)
    torchs = GpuMemory.of(checkpoint, partition, kv_tokens=100, hot=None, item_bytes=item)
    assert torchs.gb(partition) == pytest.approx((fixed_bytes + 3 * room) / 1e9)
    assert GpuMemory().gb(partition) == 0


def test_a_running_function_is_billed_by_where_its_memory_is(tiny_model_dir: Path) -> None:
    checkpoint, meter = Checkpoint.open(tiny_model_dir), new_meter()
    remote = ((2, 3),) * LAYERS
    model = split(tiny_model_dir, remote, InProcessTransport(tiny_model_dir), meter)
    memory = GpuMemory(fixed_gb=0.5, expert_gb=0.125, hot={0: frozenset({0, 1})})
    deployment = deployment_of(checkpoint, remote)
    meter.main_memory_gb = deployment.main_memory_gb
    live = LivePartition(model, checkpoint, deployment, meter, memory)

    def billed() -> tuple[float, float]:
        request = meter.open()
        meter.begin_step([Span(request, 1)], 0.0)
        meter.end_step(2.0)
        return request.ledger.main_gpu_gb_s, request.ledger.main_cpu_gb_s

    assert billed() == (1.5, 1.5)
    fewer = deployment_of(checkpoint, ((1, 2, 3),) * LAYERS, "next")
    live.change(msgspec.structs.replace(fewer, main_memory_gb=1.0))
    assert billed() == (1.25, 0.75)
    # What the plan counts is what is billed, whatever the GPU holds besides.
    live.change(msgspec.structs.replace(fewer, main_memory_gb=0.25))
    assert billed() == (0.5, 0.0)
