"""Counts which experts a model's tokens are routed to, without changing what it computes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from main_model_fn.experts_modules import experts_by_layer

__all__ = ["RoutingRecorder"]

IMPLEMENTATION = "remoe_recorded"


class RoutingRecorder:
    """Counts, for each sequence of a batch, how often each layer routes its tokens to each expert.

    It stands in transformers' registry of experts functions and passes every call on to the
    implementation that the model would have used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._inner = str(model.config._experts_implementation)  # noqa: SLF001 (no public reader)
        modules = experts_by_layer(model)
        self._layers = {id(module): layer for layer, module in modules.items()}
        self._shape = (
            cast("int", model.config.num_hidden_layers),
            cast("int", next(iter(modules.values())).num_experts),
        )
        self._mask: Tensor | None = None
        self._counts = torch.zeros(0)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Record while the block runs; the model is as before after it."""
        ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = self._forward
        self._model.set_experts_implementation(IMPLEMENTATION)
        try:
            yield
        finally:
            self._model.set_experts_implementation(self._inner)
            del ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]

    def begin(self, mask: Tensor) -> None:
        """Start counting at zero; the next pass's `mask` is as in `expect`."""
        self._counts = torch.zeros(len(mask), *self._shape, dtype=torch.float32, device=mask.device)
        self.expect(mask)

    def expect(self, mask: Tensor) -> None:
        """Say which tokens of the next pass count: `mask` [sequences, length] is 1 where one does."""
        self._mask = mask.bool()

    def profiles(self) -> NDArray[np.float32]:
        """Return the profiles counted since `begin`, [sequences, layers, experts].

        Every row sums to 1, but those of dense layers, and of a sequence of which no token
        counted: they are zero.
        """
        shares = self._counts / self._counts.sum(-1, keepdim=True).clamp(min=1)
        return shares.cpu().numpy()

    def _forward(
        self, module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        if self._mask is None:
            raise RuntimeError("begin() says which tokens count, before the model runs")
        sequences, length = self._mask.shape
        routed = F.one_hot(top_k_index.view(sequences, length, -1), self._shape[1]).sum(2)
        counted = (routed * self._mask[..., None]).sum(1)  # [sequences, experts]
        self._counts[:, self._layers[id(module)]] += counted
        if self._inner == "eager":
            # The registry has no entry for the model's own loop: it is what the decorator wrapped.
            inner = inspect.unwrap(type(module).forward)
        else:
            inner = ALL_EXPERTS_FUNCTIONS[self._inner]
        out: Tensor = inner(module, hidden, top_k_index, top_k_weights)
        return out
