"""Find the experts modules of a transformers model, and refuse those not known how to split."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from main_model_fn.native_model import NativeModel
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.experts import ExpertId

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["checked_experts", "experts_by_layer"]

_NAME = re.compile(r"\.layers\.(\d+)\..*\bexperts$")


def experts_by_layer(model: NativeModel | PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The modules that transformers' experts registry serves, in the order of their layers.

    Of a native model, what stands for them.
    """
    if isinstance(model, NativeModel):
        return model.experts
    found = {
        int(match.group(1)): module
        for name, module in model.named_modules()
        if (match := _NAME.search(name)) and hasattr(module, "_apply_gate")
    }
    return dict(sorted(found.items()))


def checked_experts(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[int, torch.nn.Module]:
    """The same, of a model built on the `meta` device; raises CheckpointError.

    They must be in the checkpoint's layers, of its shapes, and of the family table's kind.
    """
    found = experts_by_layer(model)
    if tuple(found) != checkpoint.moe_layers:
        raise CheckpointError(
            f"the checkpoint holds experts in layers {list(checkpoint.moe_layers)}, transformers' "
            f"{type(model).__name__} has them in {list(found)}"
        )
    for layer, module in found.items():
        _check_module(module, checkpoint, layer)
    return found


def _check_module(module: torch.nn.Module, checkpoint: Checkpoint, layer: int) -> None:
    """Refuse experts that are computed in a way, or laid out in a shape, that is not known here."""
    layout = checkpoint.family.layout
    flags = {
        "has_gate": True,
        "has_post_expert_norm": False,
        "has_bias": layout.bias is not None,
        "is_transposed": layout.transposed,
        "is_concatenated": not layout.interleaved,
    }
    unlike = {name: getattr(module, name) for name in flags if getattr(module, name) != flags[name]}
    if unlike:
        raise CheckpointError(
            f"layer {layer}: {type(module).__name__} says {unlike}, which the family table's "
            f"{layout.summary} is not"
        )
    inner, hidden = checkpoint.expert(ExpertId(layer, 0)).gate.values.shape
    shape = (hidden, 2 * inner) if layout.transposed else (2 * inner, hidden)
    wanted = tuple(module.get_parameter("gate_up_proj").shape[1:])
    if wanted != shape:
        raise CheckpointError(
            f"layer {layer}: {type(module).__name__} wants gate and up of {list(wanted)}, the "
            f"checkpoint holds {list(shape)}"
        )
