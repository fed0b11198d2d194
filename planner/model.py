"""The numbers of a model that plans are made of.

See papers.md A.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from remoe.checkpoint import Checkpoint

__all__ = ["ModelFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes of one checkpoint; μ(e) is `expert_size_bytes`, Σ μ(f) `non_expert_size_bytes`.

    Only `moe_layers` have experts; the other layers are dense.
    """

    name: str
    digest: str
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden_size: int
    vocab_size: int
    context_length: int
    expert_size_bytes: int
    non_expert_size_bytes: int
    kv_bytes_per_token: int

    @property
    def expert_count(self) -> int:
        """Experts of all layers together."""
        return len(self.moe_layers) * self.experts

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> ModelFacts:
        return cls(
            name=name,
            digest=checkpoint.digest,
            layers=checkpoint.layers,
            moe_layers=checkpoint.moe_layers,
            experts=checkpoint.experts,
            top_k=checkpoint.top_k,
            hidden_size=checkpoint.hidden_size,
            vocab_size=checkpoint.vocab_size,
            context_length=checkpoint.context_length,
            expert_size_bytes=checkpoint.expert_size_bytes,
            non_expert_size_bytes=checkpoint.non_expert_size_bytes,
            kv_bytes_per_token=checkpoint.kv_bytes_per_token,
        )
