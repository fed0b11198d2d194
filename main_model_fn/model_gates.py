"""Find the gates of a transformers model: the routers' weights, which also foretell later layers."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from main_model_fn.experts_modules import experts_by_layer
from remoe.errors import CheckpointError

__all__ = ["model_gates"]


def model_gates(model: PreTrainedModel) -> dict[int, Tensor]:
    """Each layer's gate, [experts, hidden], found beside its experts.

    Where a family adds a bias or picks groups of experts, the weight alone stands for the gate.
    Raises CheckpointError where no module beside the experts has a weight of that shape.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    gates: dict[int, Tensor] = {}
    for layer, experts in experts_by_layer(model).items():
        block = modules[names[id(experts)].rpartition(".")[0]]
        shape = [experts.num_experts, model.config.hidden_size]
        found = [
            weight
            for child in block.children()
            if isinstance(weight := _weight_of(child), Tensor) and list(weight.shape) == shape
        ]
        if len(found) != 1:
            raise CheckpointError(
                f"layer {layer}: {len(found)} modules beside the experts have a gate's weight, "
                f"{shape}; loads of {type(model).__name__} cannot be predicted"
            )
        gates[layer] = found[0].detach().float()
    return gates


def _weight_of(module: nn.Module) -> Tensor | None:
    inner = getattr(module, "layer", module)  # Granite's router keeps its gate one level deeper
    weight = getattr(inner, "weight", None)
    return weight if isinstance(weight, Tensor) else None
