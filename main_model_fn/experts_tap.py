"""See what a model's experts are given, layer by layer, without changing what it computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from main_model_fn.experts_modules import experts_by_layer

__all__ = ["Observer", "tapped_experts"]

IMPLEMENTATION = "remoe_tapped"

# Called with the layer, the experts' input [tokens, hidden] and the chosen experts [tokens, k].
Observer = Callable[[int, Tensor, Tensor], None]


@contextmanager
def tapped_experts(model: PreTrainedModel, observe: Observer) -> Iterator[None]:
    """Call `observe` before each layer's experts while the block runs; the model is as before after it.

    The tap stands in transformers' registry of experts functions and passes every call on to the
    implementation that the model would have used.
    """
    inner_name = str(model.config._experts_implementation)  # noqa: SLF001 (no public reader)
    layers = {id(module): layer for layer, module in experts_by_layer(model).items()}

    def forward(
        module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        observe(layers[id(module)], hidden, top_k_index)
        if inner_name == "eager":
            # The registry has no entry for the model's own loop: it is what the decorator wrapped.
            inner = inspect.unwrap(type(module).forward)
        else:
            inner = ALL_EXPERTS_FUNCTIONS[inner_name]
        out: Tensor = inner(module, hidden, top_k_index, top_k_weights)
        return out

    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = forward
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(inner_name)
        del ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]
