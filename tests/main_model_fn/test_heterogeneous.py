"""Experts computed on two devices, some of them streamed, give the unmodified model's answer.

The CPU stands in for the GPU: everything runs but CUDA's streams.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.heterogeneous import HeterogeneousExperts
from main_model_fn.hot_experts import HotBudget
from main_model_fn.loading import load_split_model
from main_model_fn.machine import Machine
from main_model_fn.placement import ExpertTimes
from main_model_fn.streaming import ExpertWeights, Staging
from remoe.checkpoint import Checkpoint
from remoe.experts import ExpertId, Partition
from remoe.families import FAMILIES
from remoe.kernel.native_library import NativePool
from tests.tiny_families import VOCABULARY, build_tiny_family
from tests.tiny_model import InProcessTransport, new_meter, reference

# Where everything goes if it may: copies or the CPU cost nothing, or both the same.
ALL_ON_CPU = ExpertTimes([1], [0.0], [1.0], 1.0)
ALL_STREAMED = ExpertTimes([1], [9.0], [0.0], 1.0)
BOTH = ExpertTimes([1, 64], [1.0, 1.0], [0.1, 0.1], 1.0)
CPU = torch.device("cpu")


def machine_of(model: PreTrainedModel) -> Machine:
    (machine,) = {local.machine for local in locals_of(model)}
    return machine


def locals_of(model: PreTrainedModel) -> list[HeterogeneousExperts]:
    """Of each layer."""
    found = [cast("Any", module).remoe.local for module in experts_by_layer(model).values()]
    assert all(isinstance(local, HeterogeneousExperts) for local in found)
    return found


def load(
    model_dir: Path,
    pool: NativePool,
    *,
    times: ExpertTimes | None = BOTH,
    hot_experts: int = 0,
    remote: dict[int, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    transport: InProcessTransport | None = None,
) -> PreTrainedModel:
    checkpoint = Checkpoint.open(model_dir)
    weights = checkpoint.expert(ExpertId(checkpoint.moe_layers[0], 0)).all()
    expert_bytes = sum(tensor.values.size for tensor in weights) * dtype.itemsize
    layers = range(checkpoint.layers)
    model = load_split_model(
        model_dir,
        partition=Partition(
            experts=checkpoint.experts,
            remote=tuple((remote or {}).get(layer, ()) for layer in layers),
        ),
        dtype=dtype,
        device=CPU,
        transport=transport or InProcessTransport(model_dir),
        function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 0.5),
        meter=new_meter(experts=checkpoint.experts, layers=checkpoint.layers),
        pool=pool,
        hot=HotBudget(hot_experts * expert_bytes),
    )
    if times is not None:
        machine_of(model).times = times
    return model


def tokens(rows: int, length: int, seed: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (rows, length), generator=generator)


def error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Of the largest logit."""
    return float((expected - got).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def unmodified(tiny_model_dir: Path) -> PreTrainedModel:
    return reference(tiny_model_dir)


@given(
    times=st.sampled_from([ALL_ON_CPU, ALL_STREAMED, BOTH]),
    hot_experts=st.integers(0, 12),
    remote=st.dictionaries(
        st.integers(0, 2), st.sets(st.integers(0, 3)).map(lambda found: tuple(sorted(found)))
    ),
    batch=st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(0, 999)),
)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_logits_equal_the_unmodified_models_wherever_experts_are(
    tiny_model_dir: Path,
    unmodified: PreTrainedModel,
    pool: NativePool,
    times: ExpertTimes,
    hot_experts: int,
    remote: dict[int, tuple[int, ...]],
    batch: tuple[int, int, int],
) -> None:
    model = load(tiny_model_dir, pool, times=times, hot_experts=hot_experts, remote=remote)
    asked = tokens(*batch)
    with torch.inference_mode():
        assert error(unmodified(asked).logits, model(asked).logits) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_transformers_does(
    family: str, tmp_path: Path, pool: NativePool
) -> None:
    folder = build_tiny_family(tmp_path, family)
    model, asked = load(folder, pool, hot_experts=1), tokens(1, 9, 4)
    with torch.inference_mode():
        assert error(reference(folder)(asked).logits, model(asked).logits) <= 1e-5
    computed = machine_of(model).computed
    assert computed["cpu"] > 0
    assert computed["streamed"] > 0


def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    tiny_model_dir: Path, unmodified: PreTrainedModel, pool: NativePool
) -> None:
    asked = tokens(2, 20, 8)
    theirs = reference(tiny_model_dir, torch.bfloat16)
    ours = load(tiny_model_dir, pool, hot_experts=4, dtype=torch.bfloat16)
    with torch.inference_mode():
        exact = unmodified(asked).logits
        assert error(exact, ours(asked).logits) <= 1.2 * error(exact, theirs(asked).logits) + 1e-3


def test_experts_go_where_the_times_say_and_hot_ones_stay(
    tiny_model_dir: Path, pool: NativePool
) -> None:
    asked = tokens(1, 30, 2)
    computed = []
    for times, hot_experts in ((ALL_ON_CPU, 0), (ALL_STREAMED, 0), (ALL_STREAMED, 12)):
        model = load(tiny_model_dir, pool, times=times, hot_experts=hot_experts)
        with torch.inference_mode():
            model(asked)
        computed.append({k: v for k, v in machine_of(model).computed.items() if v})
    assert computed == [{"cpu": 12}, {"streamed": 12}, {"resident": 12}]


def test_what_this_machine_takes_is_measured_when_experts_are_loaded(
    tiny_model_dir: Path, pool: NativePool
) -> None:
    times = machine_of(load(tiny_model_dir, pool, times=None)).times
    assert times is not None
    assert min(*times.cpu_s, *times.gpu_s, times.copy_s, times.cpu_start_s) >= 0
    assert times.gpu_s[-1] > 0
    assert times.copy_s > 0


def test_the_gpu_keeps_the_experts_that_the_profile_names(
    tiny_model_dir: Path, pool: NativePool
) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    everything = Partition(experts=4, remote=((), (1,), ()))
    size = sum(t.values.size for t in checkpoint.expert(ExpertId(0, 0)).all()) * 2
    profile = [[0.1, 0.2, 0.3, 0.4], [0.0, 0.9, 0.05, 0.05], [0.5, 0.5, 0.0, 0.0]]
    hot = HotBudget(3 * size + 1, profile).choose(checkpoint, everything, 2)
    assert hot == {0: frozenset({3}), 1: frozenset(), 2: frozenset({0, 1})}


def test_experts_are_attached_and_detached_while_the_model_serves(
    tiny_model_dir: Path, unmodified: PreTrainedModel, pool: NativePool
) -> None:
    model = load(tiny_model_dir, pool, hot_experts=2, remote={0: (0, 1, 2, 3)})
    asked = tokens(1, 12, 6)
    with torch.inference_mode():
        expected = unmodified(asked).logits
        for layer, local in enumerate(locals_of(model)):
            local.attach(range(4) if layer == 0 else ())
            local.detach((0, 3))
            assert local.residents.experts == {1, 2}
            assert error(expected, model(asked).logits) <= 1e-5


def test_a_lost_function_changes_nothing(
    tiny_model_dir: Path, unmodified: PreTrainedModel, pool: NativePool
) -> None:
    transport = InProcessTransport(tiny_model_dir)
    transport.refuse = {0, 2}
    remote = {0: (0, 1), 1: (2,), 2: (0, 1, 2, 3)}
    model, asked = load(tiny_model_dir, pool, remote=remote, transport=transport), tokens(1, 7, 1)
    with torch.inference_mode():
        assert error(unmodified(asked).logits, model(asked).logits) <= 1e-5


def test_buffers_are_filled_and_taken_by_turns() -> None:
    experts = [ExpertWeights(torch.full((4, 3), i), torch.full((3, 2), -i)) for i in range(5)]
    staging = Staging(experts[0], CPU)
    staging.send(experts[0])
    staging.send(experts[1])
    assert staging.room == 0
    with pytest.raises(ValueError, match="take an expert first"):
        staging.send(experts[2])
    for index in range(5):
        with staging.take() as weights:
            assert torch.equal(weights.gate_up, experts[index].gate_up)
            assert torch.equal(weights.down, experts[index].down)
        if index + 2 < 5:
            staging.send(experts[index + 2])
    assert staging.room == 2
