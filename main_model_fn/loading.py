"""Build a model whose remote experts were never read.

Everything but the experts is built and loaded as the library does; the experts' parameters exist
only on the `meta` device until they are replaced by the resident ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from main_model_fn.metering import StepMeter
from main_model_fn.split import (
    EXPERTS_IMPLEMENTATION,
    ExpertWeights,
    LayerExperts,
    split_experts_forward,
)
from main_model_fn.transport import ExpertTransport
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.experts import ExpertId, Partition

__all__ = ["WeightReader", "load_split_model"]

_EXPERTS_MODULE = re.compile(r"\.layers\.(\d+)\..*\bexperts$")


class WeightReader:
    """Reads single tensors and experts of a checkpoint into one dtype and device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        paths = {checkpoint.path_of(name) for name in checkpoint.names}
        self._files = {path: safe_open(path, framework="pt") for path in paths}

    def tensor(self, name: str) -> torch.Tensor:
        file = self._files[self._checkpoint.path_of(name)]
        tensor: torch.Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor.to(self._device, self._dtype)

    def expert(self, expert: ExpertId) -> ExpertWeights:
        """Gate and up fused into one matrix, as transformers fuses them when it loads."""
        gate, up, down = (
            self.tensor(name) for name in self._checkpoint.family.expert_names(expert)
        )
        return ExpertWeights(gate_up=torch.cat([gate, up]), down=down)

    def non_experts(self) -> dict[str, torch.Tensor]:
        """All other tensors, by their names in the transformers module."""
        family = self._checkpoint.family
        return {
            family.module_name(name): self.tensor(name)
            for name in self._checkpoint.non_expert_names
        }


def load_split_model(
    model_dir: Path,
    *,
    partition: Partition,
    dtype: torch.dtype | None,
    device: torch.device,
    transport: ExpertTransport,
    function_memory_gb: Iterable[float],
    meter: StepMeter,
) -> PreTrainedModel:
    """The model in `model_dir` with the experts of `partition.remote` behind `transport`.

    `dtype` None means the checkpoint's own; `function_memory_gb` is per layer. Raises
    CheckpointError if the partition is not this model's or tensors are missing.
    """
    checkpoint = Checkpoint.open(model_dir)
    if (partition.layers, partition.experts) != (checkpoint.layers, checkpoint.experts):
        raise CheckpointError(
            f"the partition is for {partition.layers} layers of {partition.experts} experts, "
            f"the model has {checkpoint.layers} of {checkpoint.experts}; plan again"
        )
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, split_experts_forward)
    config = AutoConfig.from_pretrained(model_dir)
    dtype = dtype or config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    reader = WeightReader(checkpoint, dtype, device)
    for (layer, module), memory_gb in zip(_experts_modules(model), function_memory_gb, strict=True):
        for name, _ in list(module.named_parameters(recurse=False)):
            delattr(module, name)
        resident = {
            index: reader.expert(ExpertId(layer, index)) for index in partition.local(layer)
        }
        module.remoe = LayerExperts(  # type: ignore[assignment]  # not a submodule: no parameters
            layer=layer,
            model_digest=checkpoint.digest,
            resident=resident,
            load=reader.expert,
            transport=transport,
            function_memory_gb=memory_gb,
            meter=meter,
        )
    _load_non_experts(model, reader)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return model.to(device).eval()


def _experts_modules(model: PreTrainedModel) -> list[tuple[int, torch.nn.Module]]:
    found = [
        (int(match.group(1)), module)
        for name, module in model.named_modules()
        if (match := _EXPERTS_MODULE.search(name)) and hasattr(module, "_apply_gate")
    ]
    return sorted(found, key=lambda pair: pair[0])


def _load_non_experts(model: PreTrainedModel, reader: WeightReader) -> None:
    result = model.load_state_dict(reader.non_experts(), strict=False, assign=True)
    model.tie_weights()
    still_empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if still_empty or result.unexpected_keys:
        raise CheckpointError(
            f"the checkpoint does not fit the model: missing {still_empty[:5]}, "
            f"unexpected {result.unexpected_keys[:5]}"
        )
