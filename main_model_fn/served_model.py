"""A model as it is served: all native where it can be, else transformers' with native parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from main_model_fn.hot_experts import HotBudget
from main_model_fn.live_partition import check_partition
from main_model_fn.local_experts import NativeExperts
from main_model_fn.metering import StepMeter
from main_model_fn.native_model import NativeModel, NativeShape
from main_model_fn.split import SplitLayers
from main_model_fn.transport import ExpertTransport
from main_model_fn.weight_reader import WeightReader
from remoe.checkpoint import Checkpoint
from remoe.expert_call import MAX_BODY_BYTES
from remoe.experts import Partition
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_served_model"]


def load_served_model(
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
    needs_library: bool = False,
) -> NativeModel | PreTrainedModel:
    """As `load_split_model` (loading.py), without transformers where a model is all native.

    That is on the CPU, with a `pool`, and of a shape that NativeShape knows. `needs_library` says
    that something else wants the library's modules.
    """
    checkpoint = Checkpoint.open(model_dir)
    shape = NativeShape.of(checkpoint)
    if needs_library or device.type != "cpu" or hot is not None or pool is None or shape is None:
        # Only then: importing transformers takes longer than all else of a start.
        from main_model_fn.loading import load_split_model

        return load_split_model(
            model_dir,
            partition=partition,
            dtype=dtype,
            device=device,
            transport=transport,
            function_memory_gb=function_memory_gb,
            meter=meter,
            pool=pool,
            hot=hot,
            payload_limit_bytes=payload_limit_bytes,
        )
    check_partition(partition, checkpoint)
    kernel = NativeKernel(checkpoint.expert, pool, activation=checkpoint.activation)
    split = SplitLayers(
        checkpoint,
        partition,
        lambda layer: NativeExperts(layer, kernel, checkpoint),
        transport=transport,
        function_memory_gb=function_memory_gb,
        meter=meter,
        payload_limit_bytes=payload_limit_bytes,
    )
    wanted = dtype or shape.dtype
    return NativeModel(
        shape,
        WeightReader(checkpoint, wanted, device).non_experts(lambda _: wanted),
        [split.layer(layer) for layer in checkpoint.moe_layers],
        top_k=checkpoint.top_k,
        pool=pool,
        meter=meter,
    )
