"""Root-mean-square norms on the native kernel: one call where the library makes six."""

from __future__ import annotations

import torch
from torch import nn

from main_model_fn.native_dtypes import KERNEL_DTYPES
from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import Matrix, Norm

__all__ = ["NativeNorm"]


class NativeNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, rounded once."""

    def __init__(self, norm: nn.Module, epsilon: float, pool: NativePool) -> None:
        super().__init__()
        self.weight = norm.get_parameter("weight")
        self._wide = self.weight.float().contiguous()  # kept alive: the kernel has its address
        self._pool = pool
        self._epsilon = epsilon
        self._norm = self.call(0, 0, None, None)

    def call(self, rows: int, dtype: int, source: int | None, target: int | None) -> Norm:
        """The same for rows of the library's type at one address, to another."""
        values = Matrix(source, dtype)
        return Norm(rows, len(self._wide), values, self._wide.data_ptr(), self._epsilon, target)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        rows = hidden_states.contiguous()
        output = torch.empty_like(rows)
        norm = self._norm
        norm.rows = rows.numel() // norm.width
        norm.input.values, norm.input.dtype = rows.data_ptr(), KERNEL_DTYPES[rows.dtype]
        norm.output = output.data_ptr()
        self._pool.normalize(norm)
        return output

    @classmethod
    def replacing(cls, norm: nn.Module, pool: NativePool) -> NativeNorm | None:
        """The same as `norm`, or None if that is not what this computes.

        Names differ between families and so may the formula (some add 1 to the weight), so the
        two are compared.
        """
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        weight = getattr(norm, "weight", None)
        if not isinstance(epsilon, float) or weight is None or weight.ndim != 1:
            return None
        if weight.dtype not in KERNEL_DTYPES or set(dict(norm.named_parameters())) != {"weight"}:
            return None
        native = cls(norm, epsilon, pool)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(3, len(weight), generator=generator).to(weight.dtype)
        rows[1] *= 1e-3  # where epsilon counts
        try:
            expected = norm(rows)
        except (TypeError, ValueError, RuntimeError):  # it wants something else as input
            return None
        if expected.dtype != rows.dtype or expected.shape != rows.shape:
            return None
        tolerance = 4 * torch.finfo(rows.dtype).eps * expected.abs() + 1e-12
        close = ((native(rows).float() - expected.float()).abs() <= tolerance.float()).all()
        return native if close else None
