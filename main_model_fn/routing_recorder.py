"""Counts which experts a model's tokens are routed to, without changing what it computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.experts_tap import tapped_experts

__all__ = ["RoutingRecorder"]


class RoutingRecorder:
    """Counts, for each sequence of a batch, how often each layer routes its tokens to each expert."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        modules = experts_by_layer(model)
        self._shape = (
            cast("int", model.config.num_hidden_layers),
            cast("int", next(iter(modules.values())).num_experts),
        )
        self._mask: Tensor | None = None
        self._counts = torch.zeros(0)

    def installed(self) -> AbstractContextManager[None]:
        """Record while the block runs; the model is as before after it."""
        return tapped_experts(self._model, self._count)

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

    def _count(self, layer: int, hidden: Tensor, top_k_index: Tensor) -> None:
        if self._mask is None:
            raise RuntimeError("begin() says which tokens count, before the model runs")
        sequences, length = self._mask.shape
        routed = F.one_hot(top_k_index.view(sequences, length, -1), self._shape[1]).sum(2)
        self._counts[:, layer] += (routed * self._mask[..., None]).sum(1)  # [sequences, experts]
