"""Root-mean-square norms by torch's own kernel: one launch where the library's module makes six."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FusedNorm", "use_fused_norms"]


class FusedNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, rounded once."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self._epsilon = epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self._epsilon)

    @classmethod
    @torch.no_grad()
    def replacing(cls, norm: nn.Module) -> FusedNorm | None:
        """The same as `norm`, or None if that is not what this computes: the two are compared."""
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        weight = getattr(norm, "weight", None)
        if not isinstance(epsilon, float) or weight is None or weight.ndim != 1:
            return None
        if set(dict(norm.named_parameters())) != {"weight"}:
            return None
        fused = cls(weight, epsilon)
        rows = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
        rows[1] *= 1e-3  # where epsilon counts
        rows = rows.to(weight)
        try:
            expected = norm(rows)
        except (TypeError, ValueError, RuntimeError):  # it wants something else as input
            return None
        if expected.dtype != rows.dtype or expected.shape != rows.shape:
            return None
        tolerance = 4 * torch.finfo(rows.dtype).eps * expected.abs() + 1e-12
        close = ((fused(rows).float() - expected.float()).abs() <= tolerance.float()).all()
        return fused if close else None


def use_fused_norms(model: nn.Module) -> int:
    """Replace a model's norms by fused ones that compute the same; how many."""
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if not type(child).__name__.endswith("Norm"):
                continue
            fused = FusedNorm.replacing(child)
            if fused is not None:
                setattr(module, name, fused)
                count += 1
    return count
