"""Tensors of a checkpoint as torch's, one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from safetensors import safe_open

from main_model_fn.streaming import ExpertWeights
from remoe.checkpoint import Checkpoint
from remoe.experts import ExpertId

__all__ = ["WeightReader"]


class WeightReader:
    """Reads single tensors and experts of a checkpoint into one dtype and device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        paths = {checkpoint.path_of(name) for name in checkpoint.names}
        self._files = {path: safe_open(path, framework="pt") for path in paths}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        file = self._files[self._checkpoint.path_of(name)]
        whole: torch.Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]
        return whole

    def expert_part(self, name: str, index: int | None = None) -> torch.Tensor:
        """A copy of an expert's tensor, or of its part of a stacked one; the file's pages go."""
        mapped = self._checkpoint.tensor(name)
        if index is not None:
            mapped = mapped.view(mapped.values[index])
        copy = torch.from_numpy(np.array(mapped.values))
        mapped.release()
        return copy.view(torch.bfloat16) if mapped.dtype == "BF16" else copy

    def expert(self, expert: ExpertId) -> ExpertWeights:
        """One expert as transformers lays it out when it loads: gate and up in one matrix."""
        layout = self._checkpoint.family.layout
        index = expert.index if layout.stacked else None
        parts = {
            template: self.expert_part(name, index).to(self.device, self.dtype)
            for template, name in zip(
                layout.templates, self._checkpoint.family.expert_names(expert), strict=True
            )
        }
        gate_up = (
            parts[layout.gate]
            if layout.fused
            else torch.cat([parts[layout.gate], parts[layout.up]])
        )
        if layout.bias is None:
            return ExpertWeights(gate_up=gate_up, down=parts[layout.down])
        return ExpertWeights(
            gate_up=gate_up,
            down=parts[layout.down],
            gate_up_bias=parts[layout.gate + layout.bias],
            down_bias=parts[layout.down + layout.bias],
        )

    def non_experts(self, dtype_of: Callable[[str], torch.dtype | None]) -> dict[str, torch.Tensor]:
        """All other tensors, by their names in the transformers module.

        `dtype_of` a name is None where the module has no such tensor.
        """
        family = self._checkpoint.family
        names = {family.module_name(name): name for name in self._checkpoint.non_expert_names}
        return {
            module_name: self.tensor(name).to(self.device, dtype_of(module_name))
            for module_name, name in names.items()
        }
