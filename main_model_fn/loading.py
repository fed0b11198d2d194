"""Build a model whose remote experts were never read.

Everything but the experts is built and loaded as the library does; the experts' parameters exist
only on the `meta` device until they are replaced by the resident ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from main_model_fn.experts_modules import checked_experts
from main_model_fn.fused_norm import use_fused_norms
from main_model_fn.graphed_decoder import use_graphs
from main_model_fn.heterogeneous import HeterogeneousExperts
from main_model_fn.hot_experts import HotBudget
from main_model_fn.live_partition import check_partition
from main_model_fn.local_experts import LocalExperts, NativeExperts, TorchExperts
from main_model_fn.machine import Machine, slices_for
from main_model_fn.metering import StepMeter
from main_model_fn.native_layers import use_native_layers
from main_model_fn.split import EXPERTS_IMPLEMENTATION, SplitLayers, split_experts_forward
from main_model_fn.transport import ExpertTransport
from main_model_fn.weight_reader import WeightReader
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.expert_call import MAX_BODY_BYTES
from remoe.experts import ExpertId, Partition
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool

__all__ = ["load_split_model"]


def load_split_model(
    model_dir: Path,
    *,
    partition: Partition,
    dtype: torch.dtype | None,
    device: torch.device,
    transport: ExpertTransport,
    function_memory_gb: Mapping[int, float],
    meter: StepMeter,
    pool: NativePool | None = None,
    hot: HotBudget | None = None,
    payload_limit_bytes: int = MAX_BODY_BYTES,
) -> PreTrainedModel:
    """The model in `model_dir` with the experts of `partition.remote` behind `transport`.

    With a `pool` and the CPU as device, experts and linear layers are computed natively, and
    resident experts stay in the mapped files. With a pool and a GPU both compute experts, those
    within the `hot` budget from the GPU's memory (given one, the CPU can stand in for the GPU).
    Without a pool torch computes copies of them on the device.
    `dtype` None means the checkpoint's own; `function_memory_gb` is by layer, for those that have
    experts. Raises CheckpointError if the partition is not this model's, tensors are missing, or
    the experts are of a kind that is not supported.
    """
    checkpoint = Checkpoint.open(model_dir)
    check_partition(partition, checkpoint)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, split_experts_forward)
    config = AutoConfig.from_pretrained(model_dir)
    dtype = dtype or config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    reader = WeightReader(checkpoint, dtype, device)
    if device.type != "cpu":
        hot = hot or HotBudget(0)
    split = SplitLayers(
        checkpoint,
        partition,
        _local_experts(checkpoint, partition, reader, pool, hot),
        transport=transport,
        function_memory_gb=function_memory_gb,
        meter=meter,
        payload_limit_bytes=payload_limit_bytes,
    )
    for layer, module in checked_experts(model, checkpoint).items():
        for name, _ in list(module.named_parameters(recurse=False)):
            delattr(module, name)
        module.remoe = split.layer(layer)  # type: ignore[assignment]  # not a submodule: no parameters
    _load_non_experts(model, reader, dtype)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    model = model.to(device).eval().requires_grad_(requires_grad=False)
    if pool is not None:
        if hot is None:
            use_native_layers(model, pool, meter)
        else:
            use_fused_norms(model)
            use_graphs(model, meter)
    return model


def _local_experts(
    checkpoint: Checkpoint,
    partition: Partition,
    reader: WeightReader,
    pool: NativePool | None,
    hot: HotBudget | None,
) -> Callable[[int], LocalExperts]:
    """What makes the local experts of a layer, as the machine allows."""
    if pool is None:
        return lambda layer: TorchExperts(layer, reader.expert)
    if hot is None:
        kernel = NativeKernel(checkpoint.expert, pool, activation=checkpoint.activation)
        return lambda layer: NativeExperts(layer, kernel, checkpoint)
    first = ExpertId(checkpoint.moe_layers[0], 0)
    machine = Machine(
        checkpoint.expert,
        pool,
        device=reader.device,
        dtype=reader.dtype,
        activation=checkpoint.activation,
        slices=slices_for(checkpoint.top_k, len(checkpoint.expert(first).gate.values)),
    )
    hottest = hot.choose(checkpoint, partition, reader.dtype.itemsize)
    return lambda layer: HeterogeneousExperts(layer, machine, hottest[layer])


def _load_non_experts(model: PreTrainedModel, reader: WeightReader, dtype: torch.dtype) -> None:
    holds = model.state_dict()
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001  # what must stay float32, by pattern

    def dtype_of(name: str) -> torch.dtype | None:
        if name not in holds:
            return None
        kept = (kept for pattern, kept in plan.items() if re.search(pattern, name))
        own: torch.dtype = holds[name].dtype
        return next(kept, own)

    result = model.load_state_dict(reader.non_experts(dtype_of), strict=False, assign=True)
    model.tie_weights()
    ignored = model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001
    unexpected = [
        name
        for name in result.unexpected_keys
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    buffers = {name for name, _ in model.named_buffers()}
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    missing += [name for name in result.missing_keys if name in buffers]
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoint does not fit the model: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )
