"""Replace a loaded model's modules by native ones that compute the same, where they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import structlog
import torch
from torch import nn
from transformers import PreTrainedModel

from main_model_fn.metering import StepMeter
from main_model_fn.native_attention import NativeAttention
from main_model_fn.native_decoder import NativeDecoder
from main_model_fn.native_dtypes import KERNEL_DTYPES
from main_model_fn.native_linear import NativeLinear
from main_model_fn.native_norm import NativeNorm
from remoe.kernel.native_library import NativePool

__all__ = ["use_native_layers"]

_log = structlog.get_logger()


@torch.no_grad()
def use_native_layers(model: PreTrainedModel, pool: NativePool, meter: StepMeter) -> Counter[str]:
    """Replace linear layers, norms and attentions of a model on the CPU; how many of each.

    And all layers at once, where they are of one shape that the kernel knows. But for linear
    layers, what is replaced is so only if that gives the same for random input.
    """
    rotary = getattr(model.base_model, "rotary_emb", None)
    done: Counter[str] = Counter()

    def replace(name: str, found: Callable[[nn.Module], nn.Module | None]) -> None:
        for module in list(model.modules()):
            for attribute, child in list(module.named_children()):
                native = found(child)
                if native is not None:
                    setattr(module, attribute, native)
                    done[name] += 1

    # Norms first and linear layers next: attentions are then compared as they will be.
    replace("norm", lambda child: _norm(child, pool))
    replace("linear", lambda child: _linear(child, pool))
    replace("attention", lambda child: NativeAttention.replacing(child, rotary, pool))
    body = model.base_model
    decoder = NativeDecoder.replacing(body, pool, meter)
    if decoder is not None:
        body.forward = decoder
        done["decoder"] = 1
    _log.info("native_layers", **done)
    return done


def _norm(child: nn.Module, pool: NativePool) -> nn.Module | None:
    if not type(child).__name__.endswith("Norm"):
        return None
    return NativeNorm.replacing(child, pool)


def _linear(child: nn.Module, pool: NativePool) -> nn.Module | None:
    if type(child) is not nn.Linear or child.weight.dtype not in KERNEL_DTYPES:
        return None
    return NativeLinear(child, pool)
