"""Experts copied out of a checkpoint into memory that a GPU fetches from, whole or in slices.

An expert is the sum of its slices along its intermediate dimension, each a smaller expert.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from main_model_fn.host_memory import host_empty
from main_model_fn.streaming import ExpertWeights
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.mapped import MappedTensor

__all__ = ["as_tensors", "pinned_copy", "slice_of", "slices_of"]

_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def pinned_copy(
    tensors: ExpertTensors, dtype: torch.dtype, *, slices: int, pinned: bool
) -> ExpertWeights:
    """The same numbers in one block of memory of their own, of another type if need be."""
    inner, hidden = tensors.gate.values.shape
    biased = tensors.gate_bias is not None
    numbers = ExpertWeights.size(inner, hidden, biased=biased, slices=slices)
    block = host_empty((numbers,), dtype, pinned=pinned)
    held = ExpertWeights.within(block, inner, hidden, biased=biased, slices=slices)
    for part, one in enumerate(held.cut()):
        _fill(one, slice_of(tensors, part, slices))
    return held


def _fill(held: ExpertWeights, tensors: ExpertTensors) -> None:
    inner, _ = held.shape
    _copy_into(held.gate_up[:inner], tensors.gate)
    _copy_into(held.gate_up[inner:], tensors.up)
    _copy_into(held.down, tensors.down)
    if held.gate_up_bias is None or held.down_bias is None:
        return
    for to, bias in (
        (held.gate_up_bias[:inner], tensors.gate_bias),
        (held.gate_up_bias[inner:], tensors.up_bias),
        (held.down_bias, tensors.down_bias),
    ):
        if bias is None:
            to.zero_()
        else:
            to.copy_(torch.from_numpy(bias.to_float32()))


def slice_of(tensors: ExpertTensors, part: int, slices: int) -> ExpertTensors:
    """One of an expert's equal slices; the first has the bias of what comes last."""
    if slices == 1:
        return tensors
    inner = tensors.gate.values.shape[0] // slices
    rows = slice(part * inner, (part + 1) * inner)

    def of(tensor: MappedTensor | None) -> MappedTensor | None:
        return None if tensor is None else tensor.view(tensor.values[rows])

    return ExpertTensors(
        tensors.gate.view(tensors.gate.values[rows]),
        tensors.up.view(tensors.up.values[rows]),
        tensors.down.view(tensors.down.values[:, rows]),
        of(tensors.gate_bias),
        of(tensors.up_bias),
        tensors.down_bias if part == 0 else None,
    )


def slices_of(expert: ExpertId, slices: int) -> list[ExpertId]:
    """An expert's slices, as the kernel knows them."""
    return [ExpertId(expert.layer, expert.index * slices + part) for part in range(slices)]


def as_tensors(weights: ExpertWeights) -> ExpertTensors:
    """The memory of an expert without slices, or of one slice, as the kernel takes it."""
    inner, _ = weights.shape

    def tensor(part: torch.Tensor) -> MappedTensor:
        values: NDArray[np.generic] = (
            part.view(torch.uint16) if part.dtype == torch.bfloat16 else part
        ).numpy()
        return MappedTensor(values, _STORED[part.dtype])

    matrices = (weights.gate_up[:inner], weights.gate_up[inner:], weights.down)
    if weights.gate_up_bias is None or weights.down_bias is None:
        return ExpertTensors(*(tensor(part) for part in matrices))
    biases = (weights.gate_up_bias[:inner], weights.gate_up_bias[inner:], weights.down_bias)
    return ExpertTensors(*(tensor(part) for part in (*matrices, *biases)))


def _copy_into(to: torch.Tensor, stored: MappedTensor) -> None:
    copy = torch.from_numpy(np.array(stored.values))
    to.copy_(copy.view(torch.bfloat16) if stored.dtype == "BF16" else copy)
