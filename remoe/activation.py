"""What stands between an expert's two projections, by name, for everything that computes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SILU", "Activation", "ActivationName"]

ActivationName = Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"]


@dataclass(frozen=True, slots=True)
class Activation:
    """inner = act(gate) * up; `alpha` and `limit` are clamped_swiglu's and unused by the others.

    clamped_swiglu, GPT-OSS's: with gate cut off above `limit` and up on both sides of it,
    inner = gate * sigmoid(alpha * gate) * (up + 1).
    """

    name: ActivationName = "silu"
    alpha: float = 1.702
    limit: float = 7.0


SILU = Activation()
