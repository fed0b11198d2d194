"""A model's linear layers on the native kernel: at few rows torch's cost several times as much.

One row through a [576, 576] bfloat16 layer takes torch 68 us and the memory 26 (docs/performance.md).
"""

from __future__ import annotations

import torch
from torch import nn

from main_model_fn.native_dtypes import KERNEL_DTYPES
from remoe.kernel.native_library import NativePool
from remoe.kernel.projector import Projector, StoredWeights

__all__ = ["NativeLinear"]


class NativeLinear(nn.Linear):
    """The same weights, sums in float32, and one rounding to the input's type."""

    def __init__(self, linear: nn.Linear, pool: NativePool) -> None:
        # The parameters are another module's and may be tied: nothing is made anew.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        assert linear.weight.is_contiguous()  # noqa: S101  # as every loaded parameter is
        self._wide_bias = None if linear.bias is None else linear.bias.float()
        self._dtype = linear.weight.dtype
        dtype = KERNEL_DTYPES[linear.weight.dtype]
        self.stored = StoredWeights(
            address=linear.weight.data_ptr(),
            dtype=dtype,
            columns=linear.out_features,
            bias=None if self._wide_bias is None else self._wide_bias.data_ptr(),
        )
        self._projector = Projector(pool, [self.stored], width=linear.in_features, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        """[..., in_features] to [..., out_features]."""
        if input.dtype != self._dtype or input.shape[-1] != self.in_features:
            return super().forward(input)  # torch says what is wrong with it
        rows = input.contiguous()
        output = rows.new_empty((*rows.shape[:-1], self.out_features))
        count = rows.numel() // self.in_features
        if count:
            self._projector(count, rows.data_ptr(), (output.data_ptr(),))
        return output
