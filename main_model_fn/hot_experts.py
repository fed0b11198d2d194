"""Which experts a GPU keeps: as many of the most used ones as its memory has room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from main_model_fn.placement import hottest
from remoe.checkpoint import Checkpoint
from remoe.experts import ExpertId, Partition

__all__ = ["HotBudget"]


@dataclass(frozen=True, slots=True)
class HotBudget:
    """Bytes of the GPU's memory for experts, and how often each is expected to be used.

    `profile` is [layers][experts], rows sum to 1; without one all are taken to be used alike.
    """

    size_bytes: int
    profile: Sequence[Sequence[float]] | None = None

    def choose(
        self, checkpoint: Checkpoint, partition: Partition, item_bytes: int
    ) -> dict[int, frozenset[int]]:
        """By layer, of the partition's local experts held in numbers of `item_bytes`."""
        tensors = checkpoint.expert(ExpertId(checkpoint.moe_layers[0], 0)).all()
        expert_bytes = sum(tensor.values.size for tensor in tensors) * item_bytes
        alike = [1 / checkpoint.experts] * checkpoint.experts
        layers = checkpoint.moe_layers
        return hottest(
            {layer: alike if self.profile is None else self.profile[layer] for layer in layers},
            {layer: partition.local(layer) for layer in layers},
            self.size_bytes // expert_bytes,
        )
