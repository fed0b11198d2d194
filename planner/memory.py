"""How much memory a plan's functions need: the plain sum of what they hold.

The paper's optimisation (A.11) trades memory for vCPUs; this rule is its capacity side, (10e) and
(10f), with the run-time overhead that the paper leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.model import ModelFacts
from remoe.experts import Partition
from remoe.topology import ExpertEndpoint

__all__ = ["MemoryRule"]

_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRule:
    """`*_runtime_gb` is what a function holds besides weights and cache; `expert_expansion` is
    resident bytes per stored byte of a remote expert."""

    model: ModelFacts
    main_runtime_gb: float
    expert_runtime_gb: float
    expert_expansion: float

    def main_gb(self, partition: Partition, tokens: int) -> float:
        """Non-expert weights, resident experts, and keys and values for `tokens`."""
        resident = self.model.expert_count - partition.remote_count
        weights = self.model.non_expert_size_bytes + resident * self.model.expert_size_bytes
        cache = tokens * self.model.kv_bytes_per_token
        return (weights + cache) / _GB + self.main_runtime_gb

    def expert_gb(self, partition: Partition, function: ExpertEndpoint) -> float:
        """The remote experts of the function's layers, as it holds them once all were called."""
        held = self.remote_experts(partition, function)
        weights = held * self.model.expert_size_bytes * self.expert_expansion
        return weights / _GB + self.expert_runtime_gb

    @staticmethod
    def remote_experts(partition: Partition, function: ExpertEndpoint) -> int:
        layers: Sequence[tuple[int, ...]] = partition.remote[
            function.first_layer : function.last_layer + 1
        ]
        return sum(len(indices) for indices in layers)
