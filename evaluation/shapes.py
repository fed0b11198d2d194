"""Shapes of published models, from their public configurations: what cost and scaling depend on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SHAPES", "Shape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`non_expert_parameters` include embeddings and shared experts; weights take 2 bytes each.

    `moe_layers` of the `layers` have experts. `kv_bytes_per_token` is of all layers.
    """

    name: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    expert_inner: int
    non_expert_parameters: float
    kv_bytes_per_token: int

    @property
    def expert_bytes(self) -> float:
        return 2.0 * 3 * self.hidden * self.expert_inner

    @property
    def non_expert_bytes(self) -> float:
        return 2.0 * self.non_expert_parameters

    @property
    def experts_bytes(self) -> float:
        return self.moe_layers * self.experts * self.expert_bytes


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="OLMoE-1B-7B",
            layers=16,
            moe_layers=16,
            experts=64,
            top_k=8,
            hidden=2048,
            expert_inner=1024,
            non_expert_parameters=0.48e9,
            kv_bytes_per_token=131_072,
        ),
        Shape(
            name="DeepSeek-V2-Lite",
            layers=27,
            moe_layers=26,
            experts=64,
            top_k=6,
            hidden=2048,
            expert_inner=1408,
            non_expert_parameters=1.31e9,
            kv_bytes_per_token=27 * 1_152,
        ),
        Shape(
            name="Mixtral-8x7B",
            layers=32,
            moe_layers=32,
            experts=8,
            top_k=2,
            hidden=4096,
            expert_inner=14_336,
            non_expert_parameters=1.6e9,
            kv_bytes_per_token=131_072,
        ),
        # 58 of DeepSeek-V3's 61 layers have experts; the paper counts all of them.
        Shape(
            name="61 x 256",
            layers=61,
            moe_layers=61,
            experts=256,
            top_k=8,
            hidden=7168,
            expert_inner=2048,
            non_expert_parameters=17.1e9,
            kv_bytes_per_token=61 * 1_152,
        ),
    )
}
