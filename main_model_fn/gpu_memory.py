"""How much of the main function's memory is a GPU's: what is on it, and nothing else (A.2, A.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from main_model_fn.hot_experts import HotBudget
from remoe.checkpoint import Checkpoint
from remoe.experts import Partition

__all__ = ["GpuMemory"]

_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """All but experts, the key-value cache, and those experts of `hot` that are resident.

    Nothing by default, as without a GPU.
    """

    fixed_gb: float = 0.0
    expert_gb: float = 0.0
    hot: Mapping[int, frozenset[int]] = field(default_factory=dict)  # by layer

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        partition: Partition,
        *,
        kv_tokens: int,
        hot: HotBudget | None,
        item_bytes: int,
    ) -> Self:
        """Of a model on a GPU; without `hot`, torch computes all resident experts there."""
        everything = frozenset(range(checkpoint.experts))
        cache_bytes = kv_tokens * checkpoint.kv_bytes_per_token
        return cls(
            fixed_gb=(checkpoint.non_expert_size_bytes + cache_bytes) / _GB,
            expert_gb=checkpoint.expert_size_bytes / _GB,
            hot=dict.fromkeys(checkpoint.moe_layers, everything)
            if hot is None
            else hot.choose(checkpoint, partition, item_bytes),
        )

    def gb(self, partition: Partition) -> float:
        """Where `partition` says what is resident."""
        held = sum(len(hot.intersection(partition.local(at))) for at, hot in self.hot.items())
        return self.fixed_gb + held * self.expert_gb
